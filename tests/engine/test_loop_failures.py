"""What goes wrong while several callers are served: each gets the right answer or an error, and the engine goes on."""

import itertools
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from engine_cases import check_nothing_is_left

from fineserve_jax.errors import EngineError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.runner import ModelRunner

PROMPTS = [f"{i} prompts" for i in range(6)]
SAMPLING = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, seed=3)
POISON = "poison"
NUM_INTERRUPTS = 14


@pytest.fixture
def llm(make_llm):
    with make_llm() as llm:
        yield llm
    check_nothing_is_left(llm)


def tokens(outputs):
    return [output.outputs[0].token_ids for output in outputs]


@pytest.fixture
def break_steps(monkeypatch):
    """Lets steps fail for which `is_bad` is true of the requests that they compute."""

    def patch(is_bad):
        collect = ModelRunner.collect

        def faulty(runner, launched):
            result = collect(runner, launched)  # so that the arena has changed
            if is_bad([chunk.request for chunk in launched.output.chunks]):
                raise ZeroDivisionError("broken")
            return result

        monkeypatch.setattr(ModelRunner, "collect", faulty)

    return patch


def test_a_step_that_fails_once_costs_nobody_an_answer(llm, break_steps):
    expected, failures = tokens(llm.generate(PROMPTS, SAMPLING)), [True, True, True]

    def is_bad(requests):
        return requests[0].num_output_tokens in (0, 3, 7) and bool(failures) and failures.pop()

    break_steps(is_bad)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(llm.generate, PROMPTS[i : i + 2], SAMPLING) for i in range(0, 6, 2)]
        assert [one for call in calls for one in tokens(call.result())] == expected
    assert not failures


def test_a_request_that_breaks_every_step_is_found_and_ends_with_the_error(llm, break_steps):
    expected = tokens(llm.generate(PROMPTS, SAMPLING))
    poison = llm.tokenizer.encode(POISON)
    break_steps(lambda requests: any(request.prompt_token_ids == poison for request in requests))
    outputs = llm.generate([*PROMPTS[:3], POISON, *PROMPTS[3:], POISON], SAMPLING)
    assert tokens(outputs[:3] + outputs[4:7]) == expected
    for output in (outputs[3], outputs[7]):
        (sample,) = output.outputs
        assert (sample.finish_reason, sample.token_ids) == ("error", [])
        assert sample.error == "the engine failed: ZeroDivisionError: broken"
    with pytest.raises(EngineError, match="ZeroDivisionError: broken") as caught:
        list(llm.stream(POISON, SAMPLING))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    assert tokens(llm.generate(PROMPTS, SAMPLING)) == expected


def test_when_every_step_fails_every_caller_is_told_and_the_next_are_served(llm, break_steps, monkeypatch):
    expected = tokens(llm.generate(PROMPTS, SAMPLING))
    with monkeypatch.context() as patch:
        broken = True
        break_steps(lambda requests: broken)
        with ThreadPoolExecutor(3) as pool:
            calls = [pool.submit(llm.generate, PROMPTS[i : i + 2], SAMPLING) for i in range(0, 6, 2)]
            for output in (output for call in calls for output in call.result()):
                assert output.outputs[0].finish_reason == "error"
        broken = False
        patch.undo()
    assert tokens(llm.generate(PROMPTS, SAMPLING)) == expected


def test_an_engine_that_cannot_even_start_over_says_so_and_tries_again_later(llm, break_steps, monkeypatch):
    expected = tokens(llm.generate(PROMPTS, SAMPLING))
    broken = True
    break_steps(lambda requests: broken)
    with monkeypatch.context() as patch:

        def no_memory():
            raise MemoryError("none")

        patch.setattr(llm.engine.kv, "start_over", no_memory)
        with pytest.raises(EngineError, match="could not go on: MemoryError: none"):
            llm.generate(PROMPTS, SAMPLING)
    broken = False
    assert tokens(llm.generate(PROMPTS, SAMPLING)) == expected


def test_an_interrupt_at_any_moment_leaves_the_llm_as_it_was(llm):
    """Signals reach the main thread; another one is served all the while."""
    expected, rng = tokens(llm.generate(PROMPTS, SAMPLING)), random.Random(4)
    started = time.perf_counter()
    llm.generate(PROMPTS, SAMPLING)
    longest = 1.2 * (time.perf_counter() - started)
    stop, others = threading.Event(), []

    def keep_asking():
        while not stop.is_set():
            others.append(tokens(llm.generate(PROMPTS[:2], SAMPLING)))

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before, num_interrupts = signal.signal(signal.SIGALRM, interrupt), 0
    thread = threading.Thread(target=keep_asking)
    thread.start()
    try:
        for i in itertools.count():
            if num_interrupts == NUM_INTERRUPTS:
                break
            assert i < 50 * NUM_INTERRUPTS, "calls were meant to be interrupted"
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, longest))
                if i % 3:
                    answered = tokens(llm.generate(PROMPTS, SAMPLING, on_step=(lambda stats: None) if i % 2 else None))
                    assert answered == expected
                else:
                    "".join(llm.stream(PROMPTS[0], SAMPLING))
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                num_interrupts += 1
            stats = llm.stats()  # comes behind whatever the call has asked for
            assert stats.num_running + stats.num_waiting <= 2
            llm.loop.call(lambda: check_integrity(llm.engine.kv))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        stop.set()
        thread.join()
    assert others
    assert all(answer == expected[:2] for answer in others)
    assert tokens(llm.generate(PROMPTS, SAMPLING)) == expected
