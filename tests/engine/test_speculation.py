"""Drafts by look-up change how many steps an answer takes, and nothing else."""

from typing import Any

import numpy as np
import pytest
from engine_cases import SETTINGS, random_model, serve
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.request.request import FinishReason, Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.profile import StepProfile

FORMATS = ("fp32", "int8", "int4")
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=60, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.5, top_k=10, seed=11),
    "penalised": SamplingParams(max_tokens=60, ignore_eos=True, frequency_penalty=0.05, logit_bias={7: 2.0}, seed=5),
}


def engine_of(model: Any, **settings: Any) -> Engine:
    engine = Engine(model, EngineConfig(**(SETTINGS | {"kv_precision": "int8"} | settings)))
    engine.runner.use_formats(engine.config.served_formats)
    return engine


@pytest.fixture(scope="module")
def drafting(tiny_model) -> Engine:
    return engine_of(tiny_model, num_speculative_tokens=7)


@pytest.fixture(autouse=True)
def _always_pays(monkeypatch):
    """Steps are said to take as long with drafts as without, so that there are drafts wherever any can be."""
    monkeypatch.setattr(StepProfile, "predict", lambda self, cost: 1.0)


def prompts_that_repeat(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    pieces = [rng.integers(1, 96, rng.integers(3, 20)).tolist() for _ in range(count)]
    return [(piece * 4)[: len(piece) + 12] for piece in pieces]


def serve_plainly(engine: Engine, prompts: list[list[int]], formats: list[str], sampling: Any) -> list[Request]:
    """Serves prompts without drafts."""
    requests = [
        engine.add_request(prompt, sampling, RequestOptions(kv_precision=name, num_speculative_tokens=0))
        for prompt, name in zip(prompts, formats, strict=True)
    ]
    while engine.has_unfinished:
        engine.step()
    return requests


def texts(requests: list[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_tokens_are_those_without_drafts(drafting, sampling):
    before = drafting.stats().num_accepted_drafts
    expected = serve_plainly(drafting, prompts_that_repeat(3), list(FORMATS), sampling)
    drafted = serve(drafting, prompts_that_repeat(3), list(FORMATS), sampling)
    assert texts(drafted) == texts(expected)
    assert drafting.stats().num_accepted_drafts > before


@pytest.mark.slow
def test_tokens_are_those_of_an_engine_without_drafts_in_all_formats(tiny_model):
    formats = ["fp32", "bf16", "fp16", "int8", "fp8", "int4"]
    engines = [engine_of(tiny_model, kv_formats=formats, num_speculative_tokens=most) for most in (0, 3)]
    expected, drafted = (serve(one, prompts_that_repeat(6), formats, SAMPLINGS["greedy"]) for one in engines)
    assert texts(drafted) == texts(expected)
    assert engines[1].stats().num_accepted_drafts > 0


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_tokens_are_those_without_drafts_whatever_is_asked(drafting, data):
    count = data.draw(st.integers(1, 5))
    prompts = prompts_that_repeat(count, seed=data.draw(st.integers(0, 9)))
    formats = data.draw(st.lists(st.sampled_from(FORMATS), min_size=count, max_size=count))
    sampling = SamplingParams(
        max_tokens=data.draw(st.integers(1, 40)),
        temperature=data.draw(st.sampled_from([0.0, 0.5])),
        seed=data.draw(st.integers(0, 3)),
        min_tokens=data.draw(st.integers(0, 1)),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1.01])),
        stop_token_ids=data.draw(st.lists(st.integers(1, 95), max_size=3)),
        logprobs=data.draw(st.sampled_from([None, 2])),
    )
    expected = serve_plainly(drafting, prompts, formats, sampling)
    drafted = serve(drafting, prompts, formats, sampling)
    assert texts(drafted) == texts(expected)
    assert [r.finish_reason for r in drafted] == [r.finish_reason for r in expected]
    for one, other in zip(drafted, expected, strict=True):
        assert len(one.logprobs) == len(other.logprobs)
        for mine, theirs in zip(one.logprobs, other.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-3)


def test_a_sequence_that_repeats_itself_is_written_some_tokens_a_step(drafting):
    sampling = SamplingParams(max_tokens=64, ignore_eos=True, logit_bias={7: 100.0})
    before = drafting.stats().num_steps
    (request,) = serve(drafting, [[1, 2, 3]], ["int8"], sampling)
    assert request.output_token_ids == [7] * 64
    assert drafting.stats().num_steps - before < 64 / 4


def test_a_stop_string_among_accepted_drafts_ends_the_text(drafting):
    sampling = SamplingParams(max_tokens=64, stop=["666666666666"], logit_bias={7: 100.0})  # token 7 is a "6"
    (request,) = serve(drafting, [[1, 2, 3]], ["int4"], sampling)
    assert request.output_token_ids == [7] * 12
    assert request.finish_reason is FinishReason.STOP


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up(drafting):
    drafting.warm_up(FORMATS)
    before = drafting.stats().num_compilations
    for count in (1, 3, 8):
        serve(drafting, prompts_that_repeat(count), [FORMATS[i % 3] for i in range(count)], SAMPLINGS["greedy"])
    assert drafting.stats().num_compilations == before


@pytest.mark.slow
def test_tokens_do_not_depend_on_preemption(tiny_model):
    formats, prompts = ["int8", "int4"] * 5, prompts_that_repeat(10)
    sampling, served = SamplingParams(max_tokens=100, ignore_eos=True), {"kv_formats": ("int8", "int4")}
    small = engine_of(tiny_model, num_speculative_tokens=7, kv_memory="150KB", **served)
    expected = serve(engine_of(tiny_model, **served), prompts, formats, sampling)
    assert texts(serve(small, prompts, formats, sampling)) == texts(expected)
    assert small.stats().num_preemptions > 0, "the memory was meant to be too small"
    assert small.stats().num_accepted_drafts > 0


@pytest.mark.slow
def test_layers_with_a_window_see_what_they_would():
    model, served = random_model(sliding_window=20, full_attention_layers=(1,)), {"kv_formats": ("int8", "int4")}
    sampling, formats = SAMPLINGS["greedy"], ["int8", "int4", "int4"]
    drafted = engine_of(model, num_speculative_tokens=7, **served)
    expected = serve(engine_of(model, **served), prompts_that_repeat(3), formats, sampling)
    assert texts(serve(drafted, prompts_that_repeat(3), formats, sampling)) == texts(expected)
    assert drafted.stats().num_accepted_drafts > 0


@pytest.mark.slow
def test_pages_that_are_narrowed_stay_in_order(tiny_model):
    engine = engine_of(tiny_model, num_speculative_tokens=7, kv_memory="280KB", kv_precision="int4")
    sampling = SamplingParams(max_tokens=100, ignore_eos=True)
    requests = serve(engine, prompts_that_repeat(8), ["auto"] * 8, sampling)
    assert all(request.num_output_tokens == 100 for request in requests)
    assert engine.kv.num_narrowed_pages > 0, "the memory was meant to be too small"


def test_a_request_may_have_fewer_drafts_and_none(drafting):
    sampling = SamplingParams(max_tokens=30, ignore_eos=True, logit_bias={7: 100.0})
    rates = []
    for most in (0, 2, 7):
        before = drafting.stats().num_steps
        drafting.add_request([1, 2, 3], sampling, RequestOptions(num_speculative_tokens=most))
        while drafting.has_unfinished:
            drafting.step()
        rates.append(drafting.stats().num_steps - before)
    assert rates[0] == 30 > rates[1] >= 10 > rates[2]


def test_what_cannot_be_honoured_is_refused(tiny_model, drafting):
    with pytest.raises(ConfigError, match=r"num_speculative_tokens=16: .* use at most 15"):
        EngineConfig(num_speculative_tokens=16)
    with pytest.raises(ConfigError, match="reproducible with num_speculative_tokens=3"):
        EngineConfig(num_speculative_tokens=3, reproducible=True)
    with pytest.raises(RequestError, match=r"num_speculative_tokens=8 is more than the engine's 7"):
        drafting.prepare([1], options=RequestOptions(num_speculative_tokens=8))
    with pytest.raises(RequestError, match=r"num_speculative_tokens=1 is more than the engine's 0"):
        engine_of(tiny_model).prepare([1], options=RequestOptions(num_speculative_tokens=1))
