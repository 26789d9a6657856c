"""Log-probabilities of prompts are those of the whole model at once, however a prompt is computed."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from engine_cases import SETTINGS, random_model, serve, with_nan
from hypothesis import given, settings
from hypothesis import strategies as st
from model_oracle import flax_logits

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.errors import NonFiniteError, RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.models import build_model
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner import scoring
from fineserve_jax.runner.shapes import StepShape

ERROR = 1e-4  # of log-probabilities, between sums in two orders
SCORED = SamplingParams(max_tokens=0, prompt_logprobs=2)
TOKENS = tuple(np.random.default_rng(0).integers(1, 96, 150).tolist())


BASE = SETTINGS | {"kv_precision": "fp32"}


@pytest.fixture(scope="module")
def make_engine(tiny_model):
    """Engines of the tiny model, all with the same programs but for the size of chunks."""

    def make(model=tiny_model, **settings) -> Engine:
        engine = Engine(model, EngineConfig(**(BASE | settings)))
        engine.runner.use_formats(BASE["kv_formats"])
        return engine

    return make


@functools.cache
def expected_logprobs(tokens: tuple[int, ...]) -> np.ndarray:
    """f32[tokens - 1, vocab], the log-probabilities after each token but the last."""
    model = random_model()
    padded = np.zeros(160, np.int32)  # one program for all lengths
    padded[: len(tokens)] = tokens
    logits = flax_logits(build_model(model.config, "fp32"), model.params, padded)[: len(tokens) - 1]
    return np.asarray(jax.nn.log_softmax(logits, axis=-1))


def assert_scored(request, first: int = 1) -> None:
    tokens = tuple(request.prompt_token_ids)
    expected = expected_logprobs(tokens)[first - 1 :]
    assert len(request.scores.entries) == len(expected)
    for entry, logprobs, token in zip(request.scores.entries, expected, tokens[first:], strict=True):
        assert entry.logprob == pytest.approx(logprobs[token], abs=ERROR)
        best = np.argsort(-logprobs)
        np.testing.assert_allclose(list(entry.top.values()), logprobs[best[: request.scores.num_top]], atol=ERROR)
        if logprobs[best[0]] - logprobs[best[1]] > ERROR:
            assert entry.is_greedy == (token == best[0])
            assert list(entry.top)[:1] in ([], [best[0]])


@settings(max_examples=6)
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=5),
    chunk=st.sampled_from([16, 64]),
    prefix_cache=st.sampled_from(["exact", "off"]),
    is_scored=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_whatever_the_chunks_and_whatever_is_cached(make_engine, lengths, chunk, prefix_cache, is_scored):
    """Prompts that begin alike, some of them scored: together, and once more when all of them are cached."""
    engine = make_engine(max_chunk_tokens=chunk, prefix_cache=prefix_cache)
    plain = SamplingParams(max_tokens=2, ignore_eos=True)
    for _ in range(2):
        requests = [
            engine.add_request(TOKENS[:length], SCORED if scored else plain, RequestOptions(kv_precision="fp32"))
            for length, scored in zip(lengths, is_scored, strict=False)
        ]
        while engine.has_unfinished:
            engine.step()
            check_integrity(engine.kv)
        for request in requests:
            if request.scores is not None:
                assert_scored(request)
                assert (request.output_token_ids, request.finish_reason) == ([], "length")


@pytest.mark.parametrize("kv_precision", ["int8", "int4"])
def test_in_a_format_that_rounds_it_makes_no_difference_either(make_engine, kv_precision):
    """Up to where a last bit falls on the other side of a rounding boundary."""
    found = []
    for chunk, prefix_cache in ((64, "off"), (16, "exact")):
        engine = make_engine(max_chunk_tokens=chunk, prefix_cache=prefix_cache)
        serve(engine, [TOKENS[:100]], [kv_precision], SamplingParams(max_tokens=1))
        (request,) = serve(engine, [TOKENS[:100]], [kv_precision], SCORED)
        found.append(np.array([entry.logprob for entry in request.scores.entries]))
    exact = np.take_along_axis(expected_logprobs(TOKENS[:100]), np.array(TOKENS[1:100])[:, None], 1)[:, 0]
    error, difference = (np.sqrt(np.mean(np.square(part))) for part in (found[0] - exact, found[0] - found[1]))
    assert difference < 0.2 * error + 1e-6


def test_only_what_was_asked_for_is_kept_from_the_cache(make_engine):
    """A prompt is taken from the cache up to the page of the first token whose successor is scored."""
    engine = make_engine()
    serve(engine, [TOKENS[:120]], ["fp32"], SamplingParams(max_tokens=1))
    for first, computed in ((1, 120), (48, 120 - 32), (49, 120 - 48), (119, 120 - 112)):
        before = engine.stats().num_prompt_tokens
        prepared = engine.prepare(TOKENS[:120], SCORED, RequestOptions(kv_precision="fp32"))
        (request,) = engine.queue(dataclasses.replace(prepared, scored_from=first))
        while engine.has_unfinished:
            engine.step()
        assert engine.stats().num_prompt_tokens - before == computed
        assert_scored(request, first)


def test_under_preemption_and_with_answers_behind_the_prompts(make_engine):
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, prompt_logprobs=0, logprobs=0)
    engine = make_engine(kv_memory="450KB", max_chunk_tokens=16, preemption="recompute", max_seq_len=256)
    requests = serve(engine, [list(TOKENS[i : i + 70]) for i in range(6)], ["fp32"] * 6, sampling)
    assert engine.stats().num_preemptions > 0, "the memory was meant to be too small"
    for request in requests:
        assert_scored(request)
        assert len(request.logprobs) == request.num_output_tokens == 60


def test_logits_are_there_a_tile_at_a_time(make_engine, monkeypatch):
    monkeypatch.setattr(scoring, "MOST_LOGITS", 17 * 96)
    engine = make_engine()
    assert scoring.tile_size(engine.runner._spec(StepShape(8, 64))) == 16
    for request in serve(engine, [list(TOKENS[:100]), list(TOKENS[:3])], ["fp32"] * 2, SCORED):
        assert_scored(request)


def test_samples_of_a_prompt_have_it_scored_once(make_engine):
    engine = make_engine()
    prepared = engine.prepare(TOKENS[:40], SamplingParams(n=3, max_tokens=4, ignore_eos=True, prompt_logprobs=1))
    samples = engine.queue(prepared)
    while engine.has_unfinished:
        engine.step()
    output = engine.output(samples)
    assert [sample.scores is None for sample in samples] == [False, True, True]
    assert output.prompt_logprobs[0] is None
    assert [len(entry.top) for entry in output.prompt_logprobs[1:]] == [1] * 39
    assert engine.stats().num_prompt_tokens == 40 + 2 * (40 - 32) or engine.stats().num_prompt_tokens == 42
    assert len({sample.output_token_ids[0] for sample in samples}) == 1


def test_a_prompt_may_be_as_long_as_the_engine_holds_if_nothing_follows_it(make_engine):
    tokens = (TOKENS * 2)[:256]
    engine = make_engine()
    (request,) = serve(engine, [list(tokens)], ["fp32"], SCORED)
    assert len(request.scores.entries) == 255
    with pytest.raises(RequestError, match="the prompt has 256 tokens; with max_seq_len=256 it may have 255, one"):
        engine.add_request(tokens, SamplingParams(max_tokens=1, prompt_logprobs=0))
    with pytest.raises(RequestError, match="the prompt has 257 tokens; with max_seq_len=256 it may have 256; shorten"):
        engine.add_request((*tokens, 5), SCORED)


def test_what_is_not_finite_ends_the_request_and_no_other(make_engine, tiny_model):
    engine = make_engine(with_nan(tiny_model, 7))
    clean = [token for token in TOKENS if token != 7][:50]
    bad, good = serve(engine, [[*clean[:20], 7, *clean[20:]], clean], ["fp32"] * 2, SCORED)
    assert isinstance(bad.error, NonFiniteError)
    assert_scored(good)


def test_after_a_warm_up_for_it_nothing_compiles(tiny_model):
    config = EngineConfig(**(BASE | {"max_seq_len": 128, "kv_formats": ("fp32",)}))
    engine = Engine(tiny_model, config)  # with programs of its own, since they are shared
    engine.warm_up(prompt_logprobs=True)
    before = engine.stats().num_compilations
    sampling = SamplingParams(max_tokens=3, prompt_logprobs=5, logprobs=2, logprob_token_ids=[5])
    serve(engine, [list(TOKENS[:length]) for length in (100, 3, 20)], ["fp32"] * 3, sampling)
    serve(engine, [list(TOKENS[:100])], ["fp32"], SCORED)
    assert engine.stats().num_compilations == before > 0


def test_tokens_that_are_asked_for_by_name_have_log_probabilities_wherever_one_is_sampled(make_engine):
    sampling = SamplingParams(max_tokens=5, ignore_eos=True, logprob_token_ids=[9, 3], temperature=1.0)
    (request,) = serve(make_engine(), [list(TOKENS[:30])], ["fp32"], sampling)
    expected = expected_logprobs((*request.token_ids, 0))[29:]
    assert len(request.logprobs) == 5
    for step, (entry, token) in enumerate(zip(request.logprobs, request.output_token_ids, strict=True)):
        assert list(entry.asked) == [9, 3]
        assert entry.top == {}
        found = [entry.logprob, *entry.asked.values()]
        np.testing.assert_allclose(found, expected[step][[token, 9, 3]], atol=ERROR)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"max_tokens": 0}, "max_tokens=0 generates nothing, which is for prompt_logprobs alone"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "n": 2}, "n=2 samples of max_tokens=0 are all empty"),
        ({"max_tokens": 0, "prompt_logprobs": 0, "min_tokens": 1}, "min_tokens=1 is more than max_tokens=0"),
        ({"prompt_logprobs": 21}, "prompt_logprobs=21: input should be less than or equal to 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs=True: a number is wanted"),
        ({"logprob_token_ids": [1.5]}, "logprob_token_ids.0=1.5: a token id is a whole number"),
        ({"logprob_token_ids": range(129)}, "logprob_token_ids=.*at most 128"),
    ],
)
def test_what_cannot_be_is_refused(fields, error):
    with pytest.raises(RequestError, match=error):
        SamplingParams(**fields)


def test_a_token_that_the_model_lacks_is_refused(make_engine):
    with pytest.raises(RequestError, match="logprob_token_ids has token 96; tiny has tokens 0 to 95"):
        make_engine().add_request([5], SamplingParams(logprob_token_ids=[96]))
