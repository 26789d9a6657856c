"""NaN and infinity end the request that they come up in, with an error that says so; nobody else notices."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import SETTINGS, random_model, serve

from fineserve_jax import CompletionOutput, EngineConfig, NonFiniteError
from fineserve_jax.engine import load as load_engine
from fineserve_jax.engine.engine import Engine
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.request.request import FinishReason, Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

FORMATS = SETTINGS["kv_formats"]
BAD = 90  # the token whose embedding is not finite
GREEDY = SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={BAD: -100.0})  # no good row ever draws it
KEYS, VALUES = 4 * 32 + 5, 6 * 32 + 5  # rows of the fused weight that make one channel of keys, or of values


def spoilt(model: LoadedModel, *path: str, row: int = BAD, value: float = np.nan) -> LoadedModel:
    """The model with a value in one row of a weight that is not finite."""

    def replaced(tree, names):
        if not names:
            return jnp.asarray(tree).at[row, 3].set(value)
        return {**tree, names[0]: replaced(tree[names[0]], names[1:])}

    return dataclasses.replace(model, params=replaced(model.params, path))


def engine_of(model: LoadedModel, **settings) -> Engine:
    engine = Engine(model, EngineConfig(**{**SETTINGS, **settings}))
    engine.runner.use_formats(engine.config.served_formats)  # so that all tests share compiled programs
    return engine


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return random_model()


@pytest.fixture(scope="module")
def spoilt_model(model) -> LoadedModel:
    return spoilt(model, "embed", "kernel")


def prompts_of(count: int, length: int = 40) -> list[list[int]]:
    """Prompts without the bad token, of some lengths."""
    rng = np.random.default_rng(3)
    return [rng.integers(1, BAD, length + 7 * i % 30).tolist() for i in range(count)]


def tokens(requests: list[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


def bad_prompts(prompts: list[list[int]], places: list[int]) -> list[list[int]]:
    return [[*prompt[:place], BAD, *prompt[place + 1 :]] for prompt, place in zip(prompts, places, strict=True)]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("max_chunk_tokens", [64, 16])
def test_a_bad_row_ends_with_an_error_and_the_others_go_on(model, value, max_chunk_tokens):
    """In every format, with good and bad prompts in the same chunks and decode steps."""
    good, bad = prompts_of(8), bad_prompts(prompts_of(4), [0, 17, -1, 33])
    prompts, formats = [*good, *bad], [*FORMATS, *FORMATS, *FORMATS]
    order = np.random.default_rng(1).permutation(len(prompts)).tolist()
    expected = serve(engine_of(model, max_chunk_tokens=max_chunk_tokens), good, formats[:8], GREEDY)
    engine = engine_of(spoilt(model, "embed", "kernel", value=value), max_chunk_tokens=max_chunk_tokens)
    shuffled = serve(engine, [prompts[i] for i in order], [formats[i] for i in order], GREEDY)
    found = [shuffled[order.index(i)] for i in range(len(prompts))]
    assert tokens(found[:8]) == tokens(expected)
    assert {request.finish_reason for request in found[:8]} == {FinishReason.LENGTH}
    for request in found[8:]:
        assert (request.finish_reason, request.output_token_ids) == (FinishReason.ERROR, [])
        assert "the logits of model 'tiny' are not finite (NaN or infinity) after 0 output tokens" in str(request.error)


def test_tokens_that_pad_a_step_do_no_harm(model):
    """Token 0 fills what a step has no request for."""
    engine = engine_of(spoilt(model, "embed", "kernel", row=0))
    without_end = SamplingParams(max_tokens=8, ignore_eos=True, logit_bias={0: -100.0})
    prompts = prompts_of(4)
    expected = serve(engine_of(model), prompts, FORMATS, without_end)
    found = serve(engine, prompts, FORMATS, without_end)
    assert tokens(found) == tokens(expected)


@pytest.mark.parametrize("kv_precision", FORMATS)
def test_no_page_with_nan_is_shared_and_pages_before_it_are(model, spoilt_model, kv_precision):
    """A page holds 16 tokens; the bad one is in the third."""
    (prompt,) = prompts_of(1, length=64)
    (bad,) = bad_prompts([prompt], [37])
    engine = engine_of(spoilt_model, max_chunk_tokens=16)
    together = serve(engine, [bad, bad, prompt], [kv_precision] * 3, GREEDY)
    assert [request.finish_reason for request in together] == ["error", "error", "length"]
    blocks = engine.kv.pool.prefix_cache.by_handle.values()
    assert blocks
    assert all(BAD not in np.frombuffer(block.tokens, np.int32) for block in blocks)
    before = engine.stats().num_prompt_tokens
    later = serve(engine, [prompt, bad[:37] + prompt[37:], bad], [kv_precision] * 3, GREEDY)
    assert engine.stats().num_prompt_tokens - before < len(prompt), "the good pages were meant to be shared"
    expected = tokens(serve(engine_of(model), [prompt], [kv_precision], GREEDY))[0]
    assert tokens([together[2], *later[:2]]) == [expected] * 3
    assert later[2].finish_reason == FinishReason.ERROR


def test_one_that_goes_bad_while_it_decodes_keeps_what_it_had(model, spoilt_model):
    prompts = prompts_of(3)
    sampling = GREEDY.model_copy(update={"max_tokens": 30, "logprobs": 1})
    expected = serve(engine_of(model), prompts, ["int8"] * 3, sampling)
    engine = engine_of(spoilt_model, async_scheduling=False)  # else the device has that token, and not the host
    options = RequestOptions(kv_precision="int8")
    requests = [engine.add_request(prompt, sampling, options) for prompt in prompts]
    while requests[1].num_output_tokens < 5:
        engine.step()
    requests[1].token_ids[-1] = BAD  # as if it had been sampled
    advanced = engine.step()
    assert requests[1] in advanced
    assert requests[1].finish_reason is FinishReason.ERROR
    assert "after 5 output tokens" in str(requests[1].error)
    assert len(requests[1].logprobs) == requests[1].num_output_tokens == 5
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    assert tokens([requests[0], requests[2]]) == tokens([expected[0], expected[2]])


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 5}, {"logprobs": 3}, {"presence_penalty": 0.5}])
@pytest.mark.parametrize(
    ("path", "row", "stage"),
    [
        (("embed", "kernel"), 5, "the embedding"),
        (("layers_0", "attn", "qkv", "kernel"), KEYS, "layer 0"),
        (("layers_0", "attn", "qkv", "kernel"), VALUES, "layer 0"),
        (("layers_1", "mlp", "down", "kernel"), 5, "layer 1"),
        (("lm_head", "kernel"), 5, "the head"),
    ],
)
def test_the_error_names_the_first_bad_stage_when_asked(model, path, row, stage, sampling):
    engine = engine_of(spoilt(model, *path, row=row), check_finite=True)
    params = SamplingParams(max_tokens=4, ignore_eos=True, **sampling)
    requests = serve(engine, [[5, 6], [7, 8, 5, 9], [5], [*range(7, 40), 5]], ["int8", "int4", "bf16", "fp32"], params)
    assert all(f"the output of {stage} is the first such" in str(request.error) for request in requests)
    unasked = serve(engine_of(spoilt(model, *path, row=row)), [[5, 6]], ["int8"], params)
    assert "set check_finite to be told which layer" in str(unasked[0].error)


def test_samples_that_fork_a_bad_prompt_all_fail(spoilt_model):
    engine = engine_of(spoilt_model)
    prompt = bad_prompts(prompts_of(1), [20])[0]
    samples = engine.queue(engine.prepare(prompt, SamplingParams(max_tokens=8, n=3, temperature=1.0)))
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    output = engine.output(samples)
    assert [sample.finish_reason for sample in output.outputs] == ["error"] * 3


@pytest.fixture
def llm(monkeypatch, spoilt_model) -> LLM:
    monkeypatch.setattr(load_engine, "load_model", lambda *_: spoilt_model)
    return LLM("tiny", **SETTINGS)


def test_generate_returns_the_error_beside_the_good_answers(llm):
    bad, good = llm.generate([[1, BAD, 2], [1, 2, 3]], GREEDY)
    assert isinstance(bad.outputs[0], CompletionOutput)
    assert (bad.outputs[0].finish_reason, bad.outputs[0].text) == ("error", "")
    assert "not finite" in bad.outputs[0].error
    assert (good.outputs[0].finish_reason, good.outputs[0].error) == ("length", None)
    assert len(good.outputs[0].token_ids) == 8
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_a_stream_raises_the_error(llm):
    with pytest.raises(NonFiniteError, match="logits of model 'tiny' are not finite"):
        "".join(llm.stream([1, BAD, 2], GREEDY))
    assert "".join(llm.stream([1, 2, 3], GREEDY)) == llm.generate([1, 2, 3], GREEDY)[0].outputs[0].text
