"""Several engines behind one front door: answers of each model as alone, and requests where they are best served."""

import asyncio
import json
from typing import Any

import jax
import numpy as np
import pytest
from serving import eventually, serving

from fineserve_jax import LLM, AsyncLLM, RequestOptions, SamplingParams
from fineserve_jax.engine.embedding import Embedding
from fineserve_jax.engine.scoring import Scoring
from fineserve_jax.engine.tickets import Inbox, Ticket
from fineserve_jax.errors import ConfigError, EngineError, RequestError
from fineserve_jax.fleet.balancer import balance
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request import FinishReason
from fineserve_jax.scheduler.router import moves
from fineserve_jax.scheduler.waits import WaitPredictor

TEN = SamplingParams(max_tokens=10, ignore_eos=True)
LONG = SamplingParams(max_tokens=110, ignore_eos=True)
REPLICAS = [{"devices": [0], "models": ["a", "b"]}, {"devices": [0], "models": ["a"]}]


@pytest.fixture(scope="module")
def llm(make_plan):
    with LLM(plan=make_plan(REPLICAS, a={}, b={"kv_precision": "int8"})) as llm:
        yield llm
        fleet: Any = llm.intake
        for replica in fleet.replicas.values():
            check_integrity(replica.engine.kv)
            assert not replica.engine.detokenizers
            assert not replica.tickets()


@pytest.fixture(scope="module")
def alone(make_plan):
    """An engine by itself."""
    with LLM(plan=make_plan(REPLICAS[:1], a={}, b={"kv_precision": "int8"})) as llm:
        yield llm


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


def engines(llm):
    return [replica.engine for replica in llm.intake.replicas.values()]


def begin(llm, count, sampling=LONG, replica="engine-0"):
    """Tickets that one replica has."""
    fleet, inbox = llm.intake, Inbox()
    tickets = []
    for number in range(count):
        token_ids = fleet.served("a").tokenizer.encode(f"number {number}")
        ticket = Ticket(fleet.prepare(token_ids, sampling, RequestOptions(model="a")), inbox, index=number)
        with fleet._lock:
            fleet._send(ticket, [replica])
        tickets.append(ticket)
    return tickets, inbox


def wait_for(tickets, inbox):
    while not all(ticket.is_done for ticket in tickets):
        inbox.wait()
    return [ticket.output() for ticket in tickets]


def test_each_model_says_what_it_says_alone_whichever_replica_answers(llm, alone):
    prompts, names = [f"prompt {i}" for i in range(12)], ["a", "a", "b"] * 4
    before = [engine.stats().num_output_tokens for engine in engines(llm)]
    assert texts(llm.generate(prompts, TEN, model=names)) == texts(alone.generate(prompts, TEN, model=names))
    after = [engine.stats().num_output_tokens for engine in engines(llm)]
    assert all(a > b for a, b in zip(after, before, strict=True)), "both replicas were meant to be used"
    stats = llm.stats()
    assert stats.num_output_tokens == sum(after)
    assert stats.kv_bytes == sum(engine.arena.nbytes for engine in engines(llm))
    assert set(stats.models) == {"a", "b"}
    assert "".join(llm.stream("prompt 0", TEN, model="a")) == texts(alone.generate("prompt 0", TEN, model="a"))[0]
    many = llm.generate_iter(prompts, TEN, ordered=True, model="a")
    assert texts(many) == texts(alone.generate(prompts, TEN, model="a"))
    ((score, _),) = llm.score("prompt", [" 1", " 2"], model="a")
    assert score.error is None
    with pytest.raises(RequestError, match="give model as one of a, b"):
        llm.generate("x", TEN)


def test_completions_and_vectors_are_those_of_an_engine_alone_whichever_replica_gives_them(llm, alone):
    """Also where a replica gives them that another one checked."""
    prompts, completions = [f"prompt {i}" for i in range(4)], [[" 1", " two", "3"]] * 4
    options = RequestOptions(model="a", kv_precision="int8")
    calls: list[Any] = [Scoring(prompts, completions, options, {}), Embedding(prompts, "mean", True, options, {})]
    expected = alone.score(prompts, completions, options), alone.embed(prompts, options, pooling="mean", normalize=True)
    found = llm.score(prompts, completions, options), llm.embed(prompts, options, pooling="mean", normalize=True)
    elsewhere = []
    for call in calls:
        inbox = Inbox()
        tickets = call.tickets(llm.intake, inbox)
        with llm.intake._lock:
            for ticket in tickets:
                llm.intake._send(ticket, ["engine-1"])
        wait_for(tickets, inbox)
        elsewhere.append(call.result(tickets))
    assert len(calls[0].tickets(llm.intake, inbox)) == 4, "the completions of a prompt were meant to be together"
    for scores, vectors in (found, elsewhere):
        for own, wanted in zip(scores, expected[0], strict=True):
            assert [score.token_ids for score in own] == [score.token_ids for score in wanted]
            for score, other in zip(own, wanted, strict=True):
                np.testing.assert_allclose(score.logprobs, other.logprobs, rtol=0, atol=1e-4)
        for vector, other in zip(vectors, expected[1], strict=True):
            np.testing.assert_allclose(vector.vector, other.vector, rtol=0, atol=1e-4)


def test_completions_go_where_a_step_has_room_for_them(make_plan):
    replicas = [{"devices": [0], "models": ["a"]}, {"devices": [0], "models": ["a"]}]
    replicas[1]["settings"] = {"max_chunk_tokens": 16, "max_seq_len": 32}
    with LLM(plan=make_plan(replicas, a={"kv_precision": "int8"})) as llm:
        fleet: Any = llm.intake
        inbox = Inbox()
        small = fleet.replicas["engine-1"]
        (many,) = Scoring(["prompt"], [[" 1", " 2"]], None, {}).tickets(fleet, inbox)
        with pytest.raises(RequestError, match="completions of a prompt have 2 tokens together, and a step computes 0"):
            fleet._prepared_for(small, many.prepared)
        (long,) = Scoring([[5] * 32], [[[6]]], None, {}).tickets(fleet, inbox)
        with pytest.raises(RequestError, match="completion have 33 tokens, and max_seq_len is 32"):
            fleet._prepared_for(small, long.prepared)
        with fleet._lock:
            fleet._send(many, ["engine-1", "engine-0"])
        wait_for([many], inbox)
        assert small.engine.stats().num_steps == 0


def test_prompts_that_begin_alike_go_where_their_prefix_is(llm, monkeypatch):
    steps = lambda self, ahead, one, is_short: (0.001 * (1 + one.prefill_tokens), 0.0)  # noqa: E731
    monkeypatch.setattr(WaitPredictor, "first_token_s", steps)
    prefix = "the beginning of all of these prompts, long enough for pages: "
    llm.generate(prefix + "0", TEN, model="a")
    before = [engine.stats().kv_counts.hit_tokens for engine in engines(llm)]
    for number in range(1, 4):
        llm.generate(prefix + str(number), TEN, model="a")
    hits = [engine.stats().kv_counts.hit_tokens - b for engine, b in zip(engines(llm), before, strict=True)]
    assert sorted(hits) == [0, 3 * 48]


def test_new_requests_go_elsewhere_when_an_engine_has_no_room(llm):
    tickets, inbox = begin(llm, 6)  # a batch has 4
    eventually(lambda: engines(llm)[0].scheduler.is_short)
    before = engines(llm)[1].stats().num_output_tokens
    llm.generate(["x", "y"], TEN, model="a")
    assert engines(llm)[1].stats().num_output_tokens == before + 20
    wait_for(tickets, inbox)


def test_requests_that_wait_are_moved_and_say_the_same(llm, alone, monkeypatch):
    monkeypatch.setattr(moves, "LEAST_GAIN_S", 0.0)
    expected = texts(alone.generate([f"number {number}" for number in range(7)], LONG, model="a"))
    tickets, inbox = begin(llm, 7)
    eventually(lambda: engines(llm)[0].scheduler.is_short)
    assert balance(llm.intake)
    moved = [ticket for ticket in tickets if ticket.prepared.arrival_s is not None]
    assert 1 <= len(moved) <= 3
    second = llm.intake.replicas["engine-1"]
    assert all(llm.intake._places[ticket] is second for ticket in moved)
    outputs = wait_for(tickets, inbox)
    assert texts(outputs) == expected
    for ticket in moved:
        assert ticket.samples[0].times.arrival_s == ticket.prepared.arrival_s  # it has waited since then


def test_what_has_begun_or_was_aborted_is_not_moved(llm):
    tickets, _ = begin(llm, 5)
    eventually(lambda: engines(llm)[0].scheduler.is_short)
    assert not llm.intake.move(tickets[0], "engine-0", "engine-1")
    assert not llm.intake.move(tickets[4], "engine-1", "engine-0")
    llm.intake.abort(tickets[4:])
    assert not llm.intake.move(tickets[4], "engine-0", "engine-1")
    moved, _inbox = begin(llm, 1)
    assert llm.intake.move(moved[0], "engine-0", "engine-1")
    llm.intake.abort(moved)
    eventually(lambda: moved[0].is_done)
    assert moved[0].samples[0].finish_reason == FinishReason.ABORT
    llm.intake.abort(tickets)
    eventually(lambda: not any(engine.has_unfinished for engine in engines(llm)))


def test_a_model_is_unloaded_from_all_and_loaded_on_those_that_are_named(make_plan, directory, alone):
    with LLM(plan=make_plan(REPLICAS, a={}, b={})) as llm:
        llm.unload_model("a")
        assert [list(engine.models) for engine in engines(llm)] == [["b"], []]
        assert texts(llm.generate("x", TEN)) == texts(llm.generate("x", TEN, model="b"))
        for numbers, wrong in (
            (None, "nothing says which"),
            ([], r"=\[\]"),
            ([2], "=.2."),
            ([0, 0], "=.0, 0."),
            ([-1], "-1"),
        ):
            with pytest.raises(ConfigError, match=rf"load_model\('c'\): .*{wrong}.*; the plan has 2 engines"):
                llm.load_model("c", str(directory), engines=numbers)
        llm.load_model("c", {"model": str(directory), "kv_precision": "int8"}, engines=[1, 0])
        assert [list(engine.models) for engine in engines(llm)] == [["b", "c"], ["c"]]
        prompts = [f"prompt {i}" for i in range(8)]
        assert texts(llm.generate(prompts, TEN, model="c")) == texts(alone.generate(prompts, TEN, model="b"))
        with pytest.raises(ConfigError, match="'c' is served already"):
            llm.load_model("c", str(directory), engines=[0])
        llm.unload_model("c")
        assert [list(engine.models) for engine in engines(llm)] == [["b"], []]
    with pytest.raises(EngineError, match="closed"):
        llm.generate("x", TEN)


def test_a_model_that_one_of_the_engines_cannot_have_none_has(make_plan, directory, monkeypatch):
    with LLM(plan=make_plan(REPLICAS, a={}, b={})) as llm:
        first, second = engines(llm)

        def fail(*args):
            raise ConfigError("no room")

        monkeypatch.setattr(second.loading, "read", fail)
        with pytest.raises(ConfigError, match="no room"):
            llm.load_model("c", str(directory), engines=[0, 1])
        assert "c" not in first.models


def test_engines_on_one_device_share_weights_until_one_gets_others(make_plan):
    with LLM(plan=make_plan(REPLICAS, a={}, b={})) as llm:
        first, second = (engine.models["a"].model.params for engine in engines(llm))

        def shared():
            return [one is other for one, other in zip(*map(jax.tree.leaves, (first, second)), strict=True)]

        assert all(shared())
        old = dict(second)
        fleet: Any = llm.intake
        fleet.replicas["engine-0"].loop.each_when_idle(
            lambda engine: engine.update_params(jax.tree.map(lambda leaf: 2 * leaf, old), "a")
        )
        assert not any(shared())
        assert all(second[name] is old[name] for name in old)


def test_a_server_serves_a_plan(make_plan, alone):
    llm = AsyncLLM(plan=make_plan(REPLICAS, a={}, b={"kv_precision": "int8"}))
    with serving(llm) as server:
        assert [one.id for one in server.client.models.list()] == ["a", "b"]
        asked = {"max_tokens": 10, "temperature": 0, "extra_body": {"ignore_eos": True}}
        for name in ("a", "b"):
            answer = server.client.completions.create(model=name, prompt="prompt 1", **asked)
            assert answer.choices[0].text == texts(alone.generate("prompt 1", TEN, model=name))[0]
            chunks = server.client.completions.create(model=name, prompt="prompt 1", stream=True, **asked)
            assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text
        assert json.loads(server.ask("/live")[2])["output_tokens"] == 40
        assert server.ask("/metrics")[0] == 200
        assert server.ask("/v1/completions", {"model": "c", "prompt": "x"})[0] == 404
    for engine in engines(llm):
        eventually(lambda engine=engine: not engine.detokenizers)
        check_integrity(engine.kv)
    asyncio.run(llm.close())
