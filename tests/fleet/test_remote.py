"""Engines behind a link that can break: answers are those of engines here, and what dies costs what must be."""

import pickle
import threading
import time
from typing import Any

import numpy as np
import pytest
from serving import eventually

from fineserve_jax import LLM, RequestOptions, SamplingParams
from fineserve_jax.engine.tickets import Inbox, Ticket
from fineserve_jax.errors import ConfigError, EngineError, RequestError
from fineserve_jax.fleet import Fleet, load_fleet
from fineserve_jax.fleet.remote import loop
from fineserve_jax.fleet.remote.host import EngineHost
from fineserve_jax.fleet.remote.link import LinkLostError
from fineserve_jax.fleet.remote.loop import RemoteLoop
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request import FinishReason

TEN = SamplingParams(max_tokens=10, ignore_eos=True)
LONG = SamplingParams(max_tokens=110, ignore_eos=True)
# Which requests are computed together is up to time here, and must not be seen in the tokens.
ALIKE = {"settings": {"reproducible": True}}
REPLICAS = [{"devices": [0], "models": ["a", "b"]} | ALIKE, {"devices": [0], "models": ["a"]} | ALIKE]


class LocalLink:
    """A link to an engine of this process, through which everything goes pickled. It can be cut, which costs the host
    its tickets, and mended, which brings another host."""

    def __init__(self, engine: Any) -> None:
        self.engine, self.is_closed = engine, False
        self.host = EngineHost(engine)
        self._whole = threading.Event()
        self._whole.set()

    def call(self, method: str, *arguments: Any) -> Any:
        host = self.host
        if not self._whole.is_set():
            raise LinkLostError("cut")
        if method != "each":
            arguments = pickle.loads(pickle.dumps(arguments))
        found = getattr(host, method)(*arguments)
        if host is not self.host or not self._whole.is_set():
            raise LinkLostError("cut meanwhile")
        return pickle.loads(pickle.dumps(found))

    def cut(self) -> None:
        self._whole.clear()
        self.host.close()

    def mend(self) -> None:
        self.host = EngineHost(self.engine)
        self._whole.set()

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture(scope="module")
def here(make_plan):
    """The same plan in this process."""
    with LLM(plan=make_plan(REPLICAS, a={}, b={"kv_precision": "int8"})) as llm:
        yield llm


@pytest.fixture(scope="module")
def engines(make_plan):
    """Of the plan, each of which a host has."""
    fleet = load_fleet(make_plan(REPLICAS, a={}, b={"kv_precision": "int8"}))
    return {name: replica.engine for name, replica in fleet.replicas.items()}


@pytest.fixture
def links(engines):
    return {name: LocalLink(engine) for name, engine in engines.items()}


@pytest.fixture
def llm(links, engines, monkeypatch):
    for name in ("IDLE_S", "AGAIN_S"):
        monkeypatch.setattr(loop, name, 0.05)
    deaths: dict[Ticket, int] = {}
    loops = {name: RemoteLoop(name, link, 20.0, deaths) for name, link in links.items()}
    fleet = Fleet(loops)
    for remote in loops.values():
        remote.give_back_to(fleet.take_back)
    with LLM(plan=fleet) as llm:
        yield llm
        eventually(lambda: not any(engine.detokenizers for engine in engines.values()))
        assert not any(replica.tickets() for replica in fleet.replicas.values())
    for name, link in links.items():
        link.host.close()
        assert link.is_closed
        check_integrity(engines[name].kv)


@pytest.fixture
def slowly(engines, monkeypatch):
    """Steps take so long that something can happen between them."""

    def slowed(step):
        def stepping():
            time.sleep(0.01)
            return step()

        return stepping

    for engine in engines.values():
        monkeypatch.setattr(engine, "step", slowed(engine.step))


def begin(llm, count, replica, sampling=LONG, *, wants_pieces=False):
    """Tickets that one engine has begun with."""
    fleet, inbox = llm.intake, Inbox()
    tickets = []
    for number in range(count):
        prepared = fleet.prepare([4 + number, 5, 6], sampling, RequestOptions(model="a"))
        tickets.append(Ticket(prepared, inbox, index=number, wants_pieces=wants_pieces))
        with fleet._lock:
            fleet._send(tickets[-1], [replica])
    eventually(lambda: all(ticket.samples and ticket.samples[0].num_output_tokens for ticket in tickets))
    return tickets, inbox


def wait_for(tickets, inbox):
    while not all(ticket.is_done for ticket in tickets):
        inbox.wait()
    return [ticket.output() for ticket in tickets]


def told(output):
    """What an answer says, whenever it came."""
    samples = [(s.text, s.token_ids, s.finish_reason, s.error, s.logprobs) for s in output.outputs]
    return output.model, output.kv_precision, output.kv_tokens, output.prompt_token_ids, samples


@pytest.mark.parametrize(
    "sampling",
    [
        TEN,
        SamplingParams(max_tokens=12, n=3, temperature=1.0, seed=7, ignore_eos=True),
        SamplingParams(max_tokens=40, stop=["e", "a"]),
        SamplingParams(max_tokens=5, logprobs=2, prompt_logprobs=1, ignore_eos=True),
    ],
    ids=["greedy", "samples", "stop", "logprobs"],
)
def test_answers_are_those_of_engines_here(llm, here, sampling):
    prompts, names = [f"prompt {i}" for i in range(6)], ["a", "a", "b"] * 2
    found, expected = (one.generate(prompts, sampling, model=names) for one in (llm, here))
    for own, wanted in zip(found, expected, strict=True):
        if sampling.logprobs is None:
            assert told(own) == told(wanted)
        assert [s.token_ids for s in own.outputs] == [s.token_ids for s in wanted.outputs]
        assert own.prompt_logprobs is None or len(own.prompt_logprobs) == len(wanted.prompt_logprobs)
        assert 0 <= own.metrics.queue_s <= own.metrics.ttft_s <= own.metrics.total_s < 60
    if sampling.n == 1:
        assert "".join(llm.stream("prompt 0", sampling, model="a")) == expected[0].outputs[0].text


def test_completions_and_vectors_are_those_of_engines_here(llm, here):
    prompts, completions = ["prompt 1", "prompt 2"], [[" 1", " two", "3"]] * 2
    for own, wanted in zip(
        llm.score(prompts, completions, model="a"), here.score(prompts, completions, model="a"), strict=True
    ):
        for score, other in zip(own, wanted, strict=True):
            np.testing.assert_allclose(score.logprobs, other.logprobs, rtol=0, atol=1e-4)
    found, expected = (one.embed(prompts, pooling="mean", model="a") for one in (llm, here))
    for own, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(own.vector, wanted.vector, rtol=0, atol=1e-4)
    assert llm.stats().kv_bytes == here.stats().kv_bytes


def test_what_cannot_be_served_is_refused_before_it_is_sent(llm):
    with pytest.raises(RequestError, match="model='c' is not served"):
        llm.generate("x", TEN, model="c")
    with pytest.raises(RequestError, match="max_seq_len"):
        llm.generate([[5] * 200], TEN, model="a")
    with pytest.raises(ConfigError, match="would not know of it"):
        llm.sleep()


def test_an_engine_that_dies_costs_whole_answers_nothing(llm, here, links, slowly):
    tickets, inbox = begin(llm, 3, "engine-1")
    links["engine-1"].cut()
    outputs = wait_for(tickets, inbox)
    expected = here.generate([[4 + i, 5, 6] for i in range(3)], LONG, model="a")
    assert [told(output) for output in outputs] == [told(output) for output in expected]
    assert not llm.intake.replicas["engine-1"].loop.is_up
    assert llm.generate("on", TEN, model="a"), "the other one was meant to serve"
    links["engine-1"].mend()
    eventually(lambda: llm.intake.replicas["engine-1"].loop.is_up)
    tickets, inbox = begin(llm, 1, "engine-1", TEN)
    assert wait_for(tickets, inbox)[0].outputs[0].finish_reason == "length"


def test_what_somebody_was_told_of_ends_with_an_error(llm, links, slowly):
    told_of, inbox = begin(llm, 1, "engine-1", wants_pieces=True)
    links["engine-1"].cut()
    with pytest.raises(EngineError, match="engine-1 died in the middle of this answer"):
        wait_for(told_of, inbox)
    links["engine-1"].mend()


def test_where_no_other_serves_a_model_its_requests_wait_for_the_replacement(llm, links):
    links["engine-0"].cut()
    eventually(lambda: not llm.intake.replicas["engine-0"].loop.is_up)
    found: list[Any] = []
    asking = threading.Thread(target=lambda: found.extend(llm.generate(["x"] * 2, TEN, model="b")))
    asking.start()
    time.sleep(0.2)
    assert not found
    links["engine-0"].mend()
    asking.join(30)
    assert [output.outputs[0].finish_reason for output in found] == ["length"] * 2
    for link in links.values():
        link.cut()
    eventually(lambda: not any(replica.loop.is_up for replica in llm.intake.replicas.values()))
    with pytest.raises(EngineError, match="all engines have died"):
        llm.generate("x", TEN, model="a")
    for link in links.values():
        link.mend()
    eventually(lambda: all(replica.loop.is_up for replica in llm.intake.replicas.values()))


def test_a_request_that_engines_die_with_is_not_tried_for_ever(llm, links, slowly):
    tickets, inbox = begin(llm, 1, "engine-1")
    links["engine-1"].cut()
    eventually(lambda: tickets[0] in llm.intake.replicas["engine-0"].tickets())
    eventually(lambda: tickets[0].samples[0].num_output_tokens)
    links["engine-0"].cut()
    with pytest.raises(EngineError, match="2 engines died with this request"):
        wait_for(tickets, inbox)
    for link in links.values():
        link.mend()
    eventually(lambda: all(replica.loop.is_up for replica in llm.intake.replicas.values()))


def test_what_nobody_wants_is_ended_where_it_is(llm, engines, slowly):
    tickets, _ = begin(llm, 2, "engine-1", wants_pieces=True)
    llm.loop.abort(tickets)
    eventually(lambda: not engines["engine-1"].detokenizers)
    assert all(ticket.is_done for ticket in tickets)


def test_what_waits_can_be_given_to_another_engine(llm, slowly):
    tickets, inbox = begin(llm, 4, "engine-1")  # as many as its batch has
    fleet = llm.intake
    waiting = Ticket(fleet.prepare([9, 9], TEN, RequestOptions(model="a")), inbox)
    with fleet._lock:
        fleet._send(waiting, ["engine-1"])
    eventually(lambda: waiting.samples)
    arrived_s = waiting.samples[0].times.arrival_s
    assert not fleet.move(tickets[0], "engine-1", "engine-0"), "it has begun"
    assert fleet.move(waiting, "engine-1", "engine-0")
    assert waiting.prepared.arrival_s == arrived_s
    output = wait_for([waiting, *tickets], inbox)[0]
    assert output.outputs[0].finish_reason == FinishReason.LENGTH
    assert len(output.outputs[0].token_ids) == 10


def test_models_that_were_loaded_are_there_again_when_an_engine_was_replaced(llm, links, engines, directory):
    llm.load_model("c", str(directory), engines=[1])
    expected = llm.generate("x", TEN, model="c")[0].outputs[0].text
    links["engine-1"].cut()
    eventually(lambda: not llm.intake.replicas["engine-1"].loop.is_up)
    engines["engine-1"].unload_model("c")  # which the replacement was never told of
    links["engine-1"].mend()
    eventually(lambda: llm.intake.replicas["engine-1"].loop.is_up)
    assert llm.generate("x", TEN, model="c")[0].outputs[0].text == expected
    llm.unload_model("c")
    assert "c" not in engines["engine-1"].models
    with pytest.raises(RequestError, match="model='c' is not served"):
        llm.generate("x", TEN, model="c")
