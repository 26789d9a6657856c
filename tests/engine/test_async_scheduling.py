"""Steps that are called while others are computed give the same answers, and are called where they can be."""

from typing import Any

import numpy as np
import pytest
from engine_cases import SETTINGS, random_model, serve, with_nan
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.engine.embedding import Embedding
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.scoring import Scoring
from fineserve_jax.engine.tickets import Inbox
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.runner.runner import ModelRunner
from fineserve_jax.scheduler.look_ahead import UNKNOWN

FORMATS = ("fp32", "int8", "int4")
SHARED = list(range(1, 40))
RNG = np.random.default_rng(3)
PROMPTS = [[*SHARED[: 39 * (i % 2)], *RNG.integers(1, 90, 5 + 4 * i).tolist()] for i in range(7)]
NAMES = [FORMATS[i % 3] for i in range(7)]
CASES = {
    "greedy": SamplingParams(max_tokens=40, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.8, top_p=0.9, seed=11, logprobs=2),
    "penalised": SamplingParams(max_tokens=40, ignore_eos=True, frequency_penalty=0.5, repetition_penalty=1.2, seed=5),
    "stopped": SamplingParams(max_tokens=60, temperature=1.0, seed=2, stop=["a", "Q"], stop_token_ids=[7, 30]),
    "held back": SamplingParams(max_tokens=40, temperature=1.0, seed=4, stop_token_ids=list(range(40)), min_tokens=9),
    "structured": SamplingParams(
        max_tokens=40, temperature=1.0, seed=9, structured_outputs=StructuredOutputsParams(regex="(ab|c[0-9]){3,30}")
    ),
}


def engine_of(model: Any, **options: Any) -> Engine:
    engine = Engine(model, EngineConfig(**(SETTINGS | {"kv_precision": "int8"} | options)))
    for served in engine.models.values():
        served.runner.use_formats(SETTINGS["kv_formats"])
    return engine


@pytest.fixture(scope="module")
def ahead(tiny_model) -> Engine:
    return engine_of(tiny_model, prefix_cache="off")


@pytest.fixture(scope="module")
def one_by_one(tiny_model) -> Engine:
    return engine_of(tiny_model, prefix_cache="off", async_scheduling=False)


def given_out(request: Request) -> tuple[Any, ...]:
    error = None if request.error is None else str(request.error)
    return request.output_token_ids, request.finish_reason, error, len(request.logprobs)


def answers(requests: list[Request]) -> list[tuple[Any, ...]]:
    return [given_out(request) for request in requests]


@pytest.mark.parametrize("name", CASES)
def test_answers_are_the_same(ahead, one_by_one, name):
    before = ahead.stats()
    found = serve(ahead, PROMPTS, NAMES, CASES[name])
    assert answers(found) == answers(serve(one_by_one, PROMPTS, NAMES, CASES[name]))
    after = ahead.stats()
    assert after.num_ahead_steps - before.num_ahead_steps > (after.num_steps - before.num_steps) / 3
    assert one_by_one.stats().num_ahead_steps == 0


def test_a_step_is_called_before_the_tokens_of_the_one_ahead_are_there(ahead, monkeypatch):
    """... and is given `UNKNOWN` for them."""
    begin, collect, calls = ModelRunner._begin, ModelRunner.collect, []

    def note_begin(runner, spec, output, behind=None):
        calls.append(("begin", behind is not None, [c.request.token_ids[c.start] for c in output.decodes]))
        return begin(runner, spec, output, behind)

    def note_collect(runner, launched):
        calls.append(("collect",))
        return collect(runner, launched)

    monkeypatch.setattr(ModelRunner, "_begin", note_begin)
    monkeypatch.setattr(ModelRunner, "collect", note_collect)
    serve(ahead, PROMPTS[:2], NAMES[:2], SamplingParams(max_tokens=6, ignore_eos=True))
    chunk, decode = ("begin", False, []), ("begin", True, [UNKNOWN, UNKNOWN])
    assert calls == [chunk, decode, ("collect",)] + [decode, ("collect",)] * 4 + [("collect",)]


@pytest.mark.parametrize(
    "options",
    [
        {"kv_memory": "120KB"},
        {"kv_memory": "150KB", "min_kv_precision": "int4", "narrow_keep_pages": 0, "prefix_cache": "off"},
        {"kv_memory": "160KB", "preemption": "recompute", "quotas": {"precision:int8": {"max": 0.92}}},
        pytest.param({"reproducible": True}, marks=pytest.mark.slow),
        {"num_speculative_tokens": 4},
        pytest.param({"check_finite": True}, marks=pytest.mark.slow),
    ],
    ids=["preempted", "narrowed", "with quotas", "reproducible", "with drafts", "checked"],
)
def test_answers_are_the_same_whatever_else_the_engine_does(tiny_model, options):
    sampling = SamplingParams(max_tokens=50, ignore_eos=True, temperature=0.7, seed=1)
    engines = [engine_of(tiny_model, async_scheduling=on, **options) for on in (True, False)]
    found, expected = (serve(engine, PROMPTS, ["int8"] * len(PROMPTS), sampling) for engine in engines)
    stats = engines[0].stats()
    if "min_kv_precision" in options:  # what is narrowed, and when, depends on when requests come
        assert stats.kv_counts.narrowed_pages > 0
        assert [len(request.output_token_ids) for request in found] == [50] * len(PROMPTS)
    else:
        assert answers(found) == answers(expected)
    if "kv_memory" in options:
        assert stats.num_preemptions + stats.kv_counts.narrowed_pages > 0
    assert (stats.num_ahead_steps > 0) == ("num_speculative_tokens" not in options)


def test_completions_are_scored_and_prompts_embedded_beside_what_is_called_ahead(ahead, one_by_one):
    calls: list[Any] = [
        Scoring([PROMPTS[3]], [[[5, 6, 7], [8, 9], [10]]], RequestOptions(kv_precision="int8"), {}),
        Embedding([PROMPTS[4]], "mean", False, RequestOptions(kv_precision="int8"), {}),
    ]

    def serve_all(engine):
        sampling = SamplingParams(max_tokens=25, ignore_eos=True)
        requests = [engine.add_request(p, sampling, RequestOptions(kv_precision="int8")) for p in PROMPTS[:3]]
        for _ in range(5):
            engine.step()
        prepared = [ticket.prepared for call in calls for ticket in call.tickets(engine, Inbox())]
        (scored,), (embedded,) = (engine.queue(own) for own in prepared)
        while engine.has_unfinished:
            engine.step()
        assert len(scored.branches) == 3
        return answers(requests), [entry.logprob for entry in scored.scores.entries], embedded.pooling.total

    before = ahead.stats().num_ahead_steps
    (found, scores, total), (expected, wanted, sums) = serve_all(ahead), serve_all(one_by_one)
    assert ahead.stats().num_ahead_steps - before > 15
    assert found == expected
    np.testing.assert_allclose(scores, wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(total, sums, rtol=0, atol=1e-4)


def test_a_request_that_fails_costs_the_others_nothing(tiny_model):
    """One whose tokens come to one that gives NaN ends there, while a step of it has been called already."""
    free = serve(engine_of(tiny_model), PROMPTS, NAMES, CASES["greedy"])
    poison = free[2].output_token_ids[20]
    engines = [engine_of(with_nan(tiny_model, poison), async_scheduling=on) for on in (True, False)]
    found, expected = (answers(serve(engine, PROMPTS, NAMES, CASES["greedy"])) for engine in engines)
    assert found == expected
    assert FinishReason.ERROR in {reason for _, reason, _, _ in found}
    for (tokens, reason, _, _), request in zip(found, free, strict=True):
        assert tokens == request.output_token_ids[: len(tokens)]
        assert (reason is FinishReason.ERROR) == (len(tokens) < 40)


def test_several_models_share_the_device():
    models = {name: random_model(name) for name in ("one", "other")}
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    names = ["one", "other", "one", "one", "one", "other", "one"]
    found, expected = (
        serve(engine_of(models, async_scheduling=on), PROMPTS, NAMES, sampling, names) for on in (True, False)
    )
    assert answers(found) == answers(expected)


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.data())
def test_requests_come_and_go_while_steps_are_on_their_way(ahead, one_by_one, data):
    """Each answer is that of the request alone, or, aborted, its beginning."""
    requests: list[Request] = []
    alone = {}
    for number in range(data.draw(st.integers(2, 6))):
        sampling = SamplingParams(max_tokens=data.draw(st.integers(1, 24)), temperature=1.0, seed=number)
        prompt = PROMPTS[number]
        (alone[number],) = serve(one_by_one, [prompt], [NAMES[number]], sampling)
        requests.append(ahead.add_request(prompt, sampling, RequestOptions(kv_precision=NAMES[number])))
        for _ in range(data.draw(st.integers(0, 6))):
            ahead.step()
        if data.draw(st.booleans()) and data.draw(st.booleans()):
            ahead.abort(data.draw(st.sampled_from(requests)))
            check_integrity(ahead.kv)
    while ahead.has_unfinished:
        ahead.step()
    assert not ahead.kv.held
    for number, request in enumerate(requests):
        expected = alone[number]
        assert request.status is RequestStatus.FINISHED
        if request.finish_reason is FinishReason.ABORT:
            assert request.output_token_ids == expected.output_token_ids[: request.num_output_tokens]
        else:
            assert given_out(request) == given_out(expected)


def test_deadlines_end_requests_on_their_way(tiny_model):
    now = [0.0]
    engine = Engine(tiny_model, engine_of(tiny_model).config, clock=lambda: now[0])
    engine.runner.use_formats(FORMATS)
    sampling = SamplingParams(max_tokens=40, ignore_eos=True)
    late = engine.add_request(PROMPTS[0], sampling, RequestOptions(kv_precision="int8", deadline_s=5.0))
    other = engine.add_request(PROMPTS[1], sampling, RequestOptions(kv_precision="int8"))
    for _ in range(4):
        engine.step()
    assert engine.stats().num_ahead_steps > 0
    now[0] = 6.0
    assert late in engine.step()
    assert (late.finish_reason, late.num_output_tokens) == (FinishReason.LATE, 4)
    while engine.has_unfinished:
        engine.step()
    (alone,) = serve(engine, [PROMPTS[1]], ["int8"], sampling)
    assert other.output_token_ids == alone.output_token_ids
