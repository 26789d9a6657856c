"""The engine on a thread of its own: callers on many threads, each with the answers that it would get alone."""

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from engine_cases import check_nothing_is_left

from fineserve_jax.errors import EngineError, RequestError
from fineserve_jax.request.sampling_params import SamplingParams

ROOT = Path(__file__).parents[2]
FORMATS = ["bf16", "int8", "int4"]
LONG = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture
def llm(make_llm):
    with make_llm() as llm:
        yield llm
    check_nothing_is_left(llm)


def sampling_of(i: int) -> SamplingParams:
    stop = {"stop": "e"} if i % 3 == 0 else {}
    return SamplingParams(max_tokens=5 + 7 * (i % 5), temperature=1.0, seed=i, ignore_eos=True, n=1 + i % 2, **stop)


def results(outputs) -> list:
    return [[(sample.text, sample.token_ids, sample.finish_reason) for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("count", [16, pytest.param(80, marks=pytest.mark.slow)])
def test_threads_that_call_at_once_get_what_they_would_get_alone(llm, count):
    """Calls of eight threads: whole answers, streams, chats with text that is cut, samples; in all formats."""
    prompts = [["x" * (1 + i), f"number {i} is"] for i in range(count)]

    def call(i: int):
        if i % 4 == 3:
            return "".join(llm.stream(prompts[i][0], sampling_of(i).model_copy(update={"n": 1}), kv_precision="int8"))
        return results(llm.generate(prompts[i], sampling_of(i), kv_precision=[FORMATS[i % 3], "bf16"]))

    alone = [call(i) for i in range(count)]
    before = llm.stats()
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(call, range(count)))
    assert together == alone
    steps = llm.stats().num_steps - before.num_steps
    assert steps < 0.6 * before.num_steps, "they were meant to be served in the same steps"


def test_a_call_that_fails_to_be_prepared_disturbs_nobody(llm):
    def call(i: int):
        if i % 2:
            with pytest.raises(RequestError, match="the prompt has 300 tokens"):
                llm.generate("x" * 300)
            return None
        return llm.generate("a" * (1 + i), LONG)[0].outputs[0].finish_reason

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(call, range(12))) == ["length", None] * 6


def test_progress_is_shown_to_the_thread_that_asked_for_it(llm):
    seen = []
    llm.generate(["a", "b"], SamplingParams(max_tokens=9), on_step=lambda s: seen.append((threading.get_ident(), s)))
    assert {thread for thread, _ in seen} == {threading.get_ident()}
    steps = [stats.num_steps for _, stats in seen]
    assert steps == sorted(set(steps))
    assert seen[-1][1].num_running == 0


def test_what_a_caller_raises_ends_its_own_requests_only(llm):
    def fail(stats):
        raise KeyError("mine")

    expected = llm.generate("one", LONG)
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(llm.generate, "one", LONG)
        with pytest.raises(KeyError, match="mine"):
            llm.generate("another", LONG, on_step=fail)
        assert results(other.result()) == results(expected)


def test_a_slow_reader_holds_nobody_up_and_misses_nothing(llm):
    expected = llm.generate("slow", LONG)[0].outputs[0].text
    stream = llm.stream("slow", LONG)
    first = next(stream)
    llm.generate(["quick"] * 3, LONG)  # by then the slow one's answer is complete, too
    pieces = list(stream)
    assert first + "".join(pieces) == expected
    assert len(pieces) == 1, "what was not read is kept once, as text"


def test_requests_end_when_their_stream_is_dropped_on_another_thread(llm):
    stream = llm.stream("one", SamplingParams(max_tokens=120, ignore_eos=True))
    next(stream)
    thread = threading.Thread(target=stream.close)
    thread.start()
    thread.join()
    assert llm.stats().num_running == 0


def test_whoever_waits_is_told_when_the_llm_is_closed(make_llm):
    llm = make_llm()
    begun, answers = threading.Event(), []

    def wait():
        with pytest.raises(EngineError, match="closed before this was answered"):
            llm.generate(["a"] * 40, LONG, on_step=lambda stats: begun.set())
        answers.append(True)

    thread = threading.Thread(target=wait)
    thread.start()
    assert begun.wait(60)
    llm.close()
    llm.close()  # a second time is no error
    thread.join(60)
    assert answers == [True]
    for call in (lambda: llm.generate("a"), lambda: llm.stream("a"), llm.stats, llm.warm_up):
        with pytest.raises(EngineError, match="this engine is closed; make another one"):
            call()
    check_nothing_is_left(llm)


def test_an_llm_that_nobody_holds_any_more_takes_its_thread_and_memory_along(make_llm):
    llm = make_llm()
    llm.generate("a", SamplingParams(max_tokens=2))
    thread, engine = llm.loop._thread, weakref.ref(llm.engine)
    del llm
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()
    del thread
    gc.collect()
    assert engine() is None


def test_a_call_from_within_a_step_is_refused_and_does_not_wait_for_itself(llm, monkeypatch):
    refused, schedule = [], llm.engine.scheduler.schedule

    def calls_back(now):
        if not refused:
            with pytest.raises(EngineError, match="from within one of its steps"):
                llm.generate("inner")
            refused.append(True)
        return schedule(now)

    monkeypatch.setattr(llm.engine.scheduler, "schedule", calls_back)
    llm.generate("outer", SamplingParams(max_tokens=2))
    assert refused == [True]


def test_a_fork_is_refused(llm):
    """No fork is made: that could hang in a library that has threads."""
    llm.loop._process = os.getpid() + 1
    for call in (lambda: llm.generate("a"), lambda: llm.stream("a"), llm.stats):
        with pytest.raises(EngineError, match=f"made by process {os.getpid() + 1}, of which this one is a fork"):
            call()
    llm.loop._process = os.getpid()


EXITS = """
import logging, sys, threading, jax
jax.config.update("jax_disable_most_optimizations", True)
logging.disable(logging.WARNING)  # such as that kernels were not built
sys.path.insert(0, {tests!r})
from engine_cases import random_model
from fineserve_jax.engine import load
from fineserve_jax import LLM, SamplingParams
load.load_model = lambda *_: random_model()
llm = LLM("tiny", max_seq_len=128, kv_memory="1MiB", kv_formats=["bf16"], max_batch_size=1)
sampling = SamplingParams(max_tokens=100, ignore_eos=True)
{body}
print("end", flush=True)
"""


@pytest.mark.parametrize(
    "body",
    [
        "stream = llm.stream('a', sampling); next(stream)",  # left in the middle
        "threading.Thread(target=lambda: print(len(llm.generate('a', sampling)))).start()",  # goes on behind the end
    ],
    ids=["in the middle of a stream", "while another thread waits"],
)
def test_a_process_exits_cleanly(body):
    script = EXITS.format(tests=str(Path(__file__).parent), body=body)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert "end" in done.stdout
    assert ("1" in done.stdout) == ("Thread" in body)
