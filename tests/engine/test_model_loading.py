"""Models loaded and unloaded while others are served: out of one memory, whose books stay exact."""

import dataclasses
import gc
import random
import sys
import threading
import weakref
from typing import Any

import jax
import psutil
import pytest
from engine_cases import random_model

from fineserve_jax.engine import model_loading
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.freed_memory import give_back_freed_memory
from fineserve_jax.engine.loop import EngineLoop
from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.engine.tickets import Inbox, Ticket
from fineserve_jax.errors import ConfigError, EngineError, ModelNotServedError, RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.quotas import Quota
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.request.request import FinishReason
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

SOURCES = {
    "small": random_model(),
    "other": random_model(num_layers=3, num_kv_heads=1),
    "thin": random_model(head_dim=8),
    "deep": random_model(num_layers=40, num_heads=8, num_kv_heads=8, intermediate_size=32),
}
OPTIONS = {"max_seq_len": 128, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "256KB"}
TEN = SamplingParams(max_tokens=10, ignore_eos=True)


@pytest.fixture(autouse=True)
def sources(monkeypatch) -> dict[str, LoadedModel]:
    """Models by what names them; each has weights of its own whenever it is loaded."""
    sources = dict(SOURCES)
    monkeypatch.setattr(model_loading, "describe_model", lambda source, weights: sources[source])
    monkeypatch.setattr(
        model_loading,
        "load_model",
        lambda source, weights, group: dataclasses.replace(
            sources[source], params=jax.tree.map(lambda leaf: leaf.copy(), sources[source].params)
        ),
    )
    return sources


def make_engine(source: str = "small", **settings) -> Engine:
    engine = Engine(SOURCES[source], EngineConfig(**(OPTIONS | {"kv_formats": ("bf16", "int8")} | settings)))
    use_formats(engine)
    return engine


def use_formats(engine: Engine) -> None:
    """So that all tests share compiled programs."""
    for served in engine.models.values():
        served.runner.use_formats(engine.config.served_formats)


def answer(engine: Engine, model: str, prompt=(5, 6, 7), kv_precision: str = "int8") -> list[int]:
    request = engine.add_request(list(prompt), TEN, RequestOptions(model=model, kv_precision=kv_precision))
    while request.finish_reason is None:
        engine.step()
    engine.release(request)
    return request.output_token_ids


def test_whoever_asks_models_are_read_by_one_thread(monkeypatch):
    """Others would each keep memory of what they read, for good."""
    engine, threads = make_engine(), []

    def load(source: str, *_: Any) -> LoadedModel:
        threads.append(threading.current_thread())
        return SOURCES[source]

    monkeypatch.setattr(model_loading, "load_model", load)
    sources = [ModelSource(model="other"), ModelSource(model="small")]
    callers = [
        threading.Thread(target=engine.loading.read, args=(name, source))
        for name, source in zip("ab", sources, strict=True)
    ]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(threads) == 2
    assert len(set(threads)) == 1
    assert not set(threads) & set(callers)


@pytest.mark.skipif(sys.platform != "linux", reason="malloc of another system keeps other books")
def test_freed_memory_is_given_back():
    """Small pieces, which malloc keeps, below one that stays."""
    process, mib = psutil.Process(), 2**20
    pieces = [bytes(16_000) for _ in range(16_000)]
    kept, full = bytes(16_000), process.memory_info().rss
    del pieces
    before = process.memory_info().rss
    give_back_freed_memory()
    assert len(kept) == 16_000
    assert full - process.memory_info().rss > 200 * mib
    assert before - process.memory_info().rss > 100 * mib


# -- between two steps ---------------------------------------------------------------------------------------------


def test_a_model_comes_says_what_it_says_alone_and_goes_and_the_others_are_not_compiled_again():
    engine = make_engine()
    alone = answer(make_engine("other"), "tiny")
    own, arena = answer(engine, "tiny"), engine.arena.nbytes
    compiled = engine.models["tiny"].runner.num_compilations
    free = engine.kv.num_free_slabs + sum(pool.num_slabs for pool in engine.kv.pool.allocator.pools.values())
    engine.load_model("second", "other")
    use_formats(engine)
    assert answer(engine, "second") == alone
    assert answer(engine, "tiny") == own
    with pytest.raises(RequestError, match="there are several; give model as one of tiny, second"):
        engine.prepare([1])
    weights = [weakref.ref(leaf) for leaf in jax.tree.leaves(engine.models["second"].model.params)]
    compilations = engine.stats().num_compilations
    engine.unload_model("second")
    gc.collect()
    assert [ref for ref in weights if ref() is not None] == []
    check_integrity(engine.kv)
    assert {page_class.model for page_class in engine.kv.pool.allocator.members} == {"tiny"}
    assert engine.stats().num_compilations == compilations  # those of a model that has gone are still counted
    assert answer(engine, "tiny") == own
    engine.kv.forget_cached()
    assert (engine.kv.num_free_slabs, engine.arena.nbytes) == (free, arena)
    assert engine.models["tiny"].runner.num_compilations == compiled


def test_another_model_may_come_under_the_name_of_one_that_went():
    """Programs that convert its pages, its prefixes and its page classes are not those of the first."""
    engine, prompt = make_engine(prefix_cache="convert"), list(range(1, 60))
    for source in ("other", "small"):
        engine.load_model("x", source)
        use_formats(engine)
        fresh = make_engine(source, prefix_cache="convert")
        for kv_precision in ("bf16", "int8"):  # the second is converted from the first
            found, expected = (answer(e, name, prompt, kv_precision) for e, name in ((engine, "x"), (fresh, "tiny")))
            assert found == expected
        assert fresh.stats().kv_counts.converted_pages > 0
        engine.unload_model("x")


def test_all_models_may_go_and_others_come():
    engine = make_engine()
    own = answer(engine, "tiny")
    engine.unload_model("tiny")
    assert engine.stats().models == {}
    assert measure_usage(engine.kv).usable_bytes
    assert engine.step() == []
    with pytest.raises(RequestError, match="no model is named, and there is none; give model as one of none, until"):
        engine.prepare([1])
    engine.load_model("again", "small")
    use_formats(engine)
    assert answer(engine, "again") == own


def test_a_request_that_was_prepared_for_a_model_that_went_is_refused_although_another_has_its_name():
    engine = make_engine()
    prepared = engine.prepare([1, 2], TEN)
    engine.load_model("second", "other")
    engine.unload_model("tiny")
    with pytest.raises(ModelNotServedError, match="'tiny' was unloaded meanwhile; those served are: second"):
        engine.queue(prepared)
    engine.load_model("tiny", "small")
    with pytest.raises(ModelNotServedError, match="'tiny' was unloaded meanwhile"):
        engine.queue(prepared)
    assert not engine.has_unfinished


def test_a_model_with_unfinished_requests_stays():
    engine = make_engine()
    engine.load_model("second", "other")
    request = engine.add_request([1, 2], TEN, RequestOptions(model="second"))
    with pytest.raises(EngineError, match=r"unload_model\('second'\) while 1 requests are unfinished"):
        engine.unload_model("second")
    engine.unload_model("tiny")
    while request.finish_reason is None:
        engine.step()
    engine.sleep()
    with pytest.raises(EngineError, match="asleep"):
        engine.unload_model("second")
    with pytest.raises(EngineError, match="asleep"):
        engine.load_model("third", "small")


def test_quotas_are_of_the_memory_as_it_is_with_the_models_that_are_there():
    engine = make_engine(quotas={"tenant:alice": Quota(guaranteed=0.5, max=0.75)})
    account = engine.scheduler.quotas.account
    guaranteed, most = account.guaranteed["tenant:alice"], account.most["tenant:alice"]
    engine.load_model("second", "other")
    assert account.guaranteed["tenant:alice"] < guaranteed  # a slab more for each length of page may be part empty
    assert account.most["tenant:alice"] == most
    engine.unload_model("second")
    assert (account.guaranteed["tenant:alice"], account.most["tenant:alice"]) == (guaranteed, most)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_whatever_comes_and_goes_the_books_are_exact_and_answers_those_of_the_model_alone(seed):
    """Random loads, unloads, requests, aborts and steps, in too little memory."""
    engine, draw, expected = make_engine(), random.Random(seed), {}
    alone = {name: Engine(SOURCES[name], engine.config) for name in ("small", "other")}
    for own in alone.values():
        use_formats(own)
    source_of, running = {"tiny": "small"}, {}
    for _ in range(150):
        name, event = (
            draw.choice(["x", "y", "tiny"]),
            draw.choice(["model", "request", "request", "abort", *["step"] * 6]),
        )
        if event == "model" and name not in source_of:
            source_of[name] = draw.choice(["small", "other"])
            engine.load_model(name, source_of[name])
            use_formats(engine)
        elif event == "model" and name not in {request.model for request in running}:
            engine.unload_model(name)
            del source_of[name]
        elif event == "request" and name in source_of:
            prompt, kv_precision = [draw.randrange(1, 90)] * draw.randrange(1, 80), draw.choice(["bf16", "int8"])
            request = engine.add_request(prompt, TEN, RequestOptions(model=name, kv_precision=kv_precision))
            running[request] = key = (source_of[name], tuple(prompt), kv_precision)
            if key not in expected:
                expected[key] = answer(alone[key[0]], "tiny", *key[1:])
        elif event == "abort" and running and draw.random() < 0.5:
            request = draw.choice(list(running))
            engine.abort(request)
            del running[request]
        elif event == "step":
            engine.step()
            for request in [request for request in running if request.finish_reason is not None]:
                assert request.output_token_ids == expected[running.pop(request)]
        check_integrity(engine.kv)
    assert len(expected) > 10


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "name", "source", "message"),
    [
        ({}, "tiny", "other", "a model called 'tiny' is served already; unload it, or choose another name"),
        ({}, " ", "other", "a model is called ' '"),
        ({}, "x", {"model": "other", "kv_memory": 1}, "unknown setting 'kv_memory'"),
        ({}, "x", {"model": "other", "kv_precision": "int4"}, "'int4' is not among kv_formats"),
        ({}, "x", {"model": "other", "max_seq_len": 5000}, "max_seq_len=5000 is more than the 512 tokens that x"),
        (
            {},
            "x",
            "thin",
            r"units of 128 bytes since the start, and a head of 'x' \(head_dim=8\) needs units of 64 bytes",
        ),
        ({}, "x", "deep", r"a page of x/bf16 takes \d+ units of 128 bytes, and a slab has \d+ since the start"),
        ({"slab_policy": "uniform"}, "x", "other", "slab_policy='uniform' divides the memory for the models that are"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_with_the_numbers_and_nothing_changes(settings, name, source, message):
    engine = make_engine(**settings)
    classes = list(engine.kv.pool.allocator.members)
    with pytest.raises(ConfigError, match=message):
        engine.load_model(name, source)
    assert list(engine.kv.pool.allocator.members) == classes
    assert list(engine.models) == list(engine.scheduler.profiles) == ["tiny"]


def test_a_model_for_whose_weights_there_is_no_memory_is_refused_before_they_are_read(monkeypatch):
    engine = make_engine()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(SOURCES["other"].params))
    monkeypatch.setattr(model_loading, "load_model", None)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": size - 1}))
    with pytest.raises(ConfigError, match=r"fp32 weights of 'x' take [\d.]+ KiB of cpu:0, which has [\d.]+ KiB left"):
        engine.load_model("x", "other")


def test_a_longest_request_that_the_memory_does_not_hold_is_refused():
    engine = make_engine(kv_memory="100KB")
    with pytest.raises(ConfigError, match=r"too small for one request: it holds .* tokens in bf16 of x"):
        engine.load_model("x", {"model": "other", "max_seq_len": 512})


def test_a_record_names_all_models_at_its_beginning(tmp_path):
    engine = make_engine(record=tmp_path / "run.jsonl")
    with pytest.raises(ConfigError, match="names at its beginning all that takes memory; leave record out"):
        engine.load_model("x", "other")


# -- while others are served ---------------------------------------------------------------------------------------


@pytest.fixture
def loop():
    loop = EngineLoop(make_engine())
    loop.load_model("second", "other")
    loop.call(lambda: use_formats(loop.engine))
    yield loop
    loop.close()


def begin(loop: EngineLoop, model: str, max_tokens: int) -> tuple[Ticket, Inbox]:
    inbox = Inbox()
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    ticket = Ticket(loop.engine.prepare([5, 6], sampling, RequestOptions(model=model)), inbox)
    loop.submit([ticket])
    return ticket, inbox


@pytest.mark.parametrize("abort", [False, True])
def test_its_requests_are_answered_or_aborted_and_others_go_on(loop, abort):
    (leaving, inbox), (staying, others) = begin(loop, "second", 100), begin(loop, "tiny", 120)
    loop.unload_model("second", abort=abort)
    inbox.wait()
    reason = FinishReason.ABORT if abort else FinishReason.LENGTH
    assert [sample.finish_reason for sample in leaving.samples] == [reason]
    others.wait()
    assert len(staying.output().outputs[0].token_ids) == 120
    assert list(loop.engine.models) == ["tiny"]


def test_requests_that_come_while_it_goes_are_refused_and_it_goes_once(loop, monkeypatch):
    begun, refusing = threading.Event(), loop._end_all
    monkeypatch.setattr(loop, "_end_all", lambda *args: (begun.set(), refusing(*args)))
    first, inbox = begin(loop, "second", 110)
    prepared = loop.engine.prepare([1], TEN, RequestOptions(model="second"))
    thread = threading.Thread(target=loop.unload_model, args=["second"])
    thread.start()
    begun.wait()
    late, others = Ticket(prepared, receiver := Inbox()), receiver
    loop.submit([late])
    others.wait()
    with pytest.raises(ModelNotServedError, match=r"'second' is (being )?unloaded"):
        late.output()
    with pytest.raises(ModelNotServedError, match="is not served, or is being unloaded; those served are: tiny"):
        loop.unload_model("second")
    thread.join()
    inbox.wait()
    assert len(first.output().outputs[0].token_ids) == 110
