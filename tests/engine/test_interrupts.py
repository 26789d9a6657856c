"""Whatever cuts a call short, and wherever: the engine goes on, answers are what they would be, the books add up.

An interrupt comes before one instruction of the package's own code or another, as with a signal: between the call of a
program that takes the arena and the assignment of what it gives, too.
"""

import itertools
import random
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import fineserve_jax
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request import FinishReason, RequestStatus
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.runner import ModelRunner
from fineserve_jax.runner.step_programs import step_programs

FOLDERS = tuple(
    str((Path(fineserve_jax.__file__).parent / name).resolve()) for name in ("engine", "kv", "runner", "scheduler")
)
FORMATS = ["bf16", "int4", "int8", "bf16", "int4", "bf16"]
SHARED = list(range(1, 40))  # two full pages that some prompts have in common
RNG = np.random.default_rng(5)
PROMPTS = [[*SHARED[: 39 * (i % 2)], *RNG.integers(1, 90, 9 + 5 * i).tolist()] for i in range(6)]
SETTINGS = {"kv_memory": "200KB", "kv_precision": "int4", "kv_formats": ("bf16", "int8", "int4"), "max_seq_len": 128}


class ResultLost(Exception):
    """Comes behind a program, before its result is put anywhere."""


class Interrupts:
    """Counts instructions of the package, and raises `KeyboardInterrupt` before one of them."""

    def __init__(self) -> None:
        self.num_left = 0  # instructions until it is raised; 0: it was

    @contextmanager
    def tracing(self):
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _on_call(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(FOLDERS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return self._on_instruction

    def _on_instruction(self, frame, event, argument):
        if event == "opcode":
            self.num_left -= 1
            if not self.num_left:
                raise KeyboardInterrupt
        return self._on_instruction


def sampling(i: int) -> SamplingParams:
    stop = {"stop": ["ab", "e"], "logit_bias": {66: 3.0}} if i == 3 else {"logprobs": 2}
    return SamplingParams(max_tokens=60, temperature=1.0, seed=i, ignore_eos=True, n=2 if i == 0 else 1, **stop)


def enter(engine) -> dict[str, list]:
    """What is asked of the engine, by name: a prompt's samples share a name."""
    asked = {}
    for i, (prompt, kv_precision) in enumerate(zip(PROMPTS, FORMATS, strict=True)):
        floor = {"min_kv_precision": "int4"} if i == 5 else {}
        options = RequestOptions(kv_precision=kv_precision, **floor)
        asked[f"prompt {i}"] = engine.queue(engine.prepare(prompt, sampling(i), options))
    return asked


def answers(engine, asked):
    return {
        name: [(engine.detokenizers[r].text, r.output_token_ids, r.finish_reason, len(r.logprobs)) for r in samples]
        for name, samples in asked.items()
        if name != "prompt 5"  # whose tokens depend on when it was narrowed
    }


def serve(engine, asked):
    while engine.has_unfinished:
        engine.step()
    return answers(engine, asked)


@pytest.fixture(scope="module")
def undisturbed(make_engine):
    engine = make_engine(**SETTINGS)
    expected = serve(engine, enter(engine))
    assert engine.stats().num_preemptions > 0, "the memory was meant to be too small"
    assert engine.kv.num_narrowed_pages > 0, "pages were meant to be narrowed"
    return expected


def forget(engine, asked):
    for request in (request for samples in asked.values() for request in samples):
        engine.release(request)


@pytest.mark.parametrize("most_interrupts", [20, pytest.param(200, marks=pytest.mark.slow)])
def test_an_interrupt_before_any_instruction_of_a_step_changes_no_answer(make_engine, undisturbed, most_interrupts):
    engine, interrupts, rng = make_engine(**SETTINGS), Interrupts(), random.Random(most_interrupts)
    num_interrupts = 0
    while num_interrupts < most_interrupts:
        asked = enter(engine)
        while engine.has_unfinished:
            if rng.random() < 0.8:  # else nothing would ever be computed to its end
                engine.step()
                continue
            interrupts.num_left = rng.randrange(1, 12000)  # a step has some thousand
            try:
                with interrupts.tracing():
                    engine.step()
            except KeyboardInterrupt:
                num_interrupts += 1
                engine.recover()
                check_integrity(engine.kv)
                engine.scheduler.quotas.check_integrity()
        assert answers(engine, asked) == undisturbed
        forget(engine, asked)
        assert not engine.kv.held
        assert engine.detokenizers == {}


def test_an_interrupt_while_requests_come_or_go_leaves_the_others_alone(make_engine):
    """Those that were being entered or aborted are gone or there, whole; the others' answers are the same."""
    engine, interrupts, rng = make_engine(**SETTINGS), Interrupts(), random.Random(2)
    kept_one = engine.prepare(PROMPTS[1], SamplingParams(max_tokens=8, ignore_eos=True), RequestOptions())
    kept = engine.queue(kept_one)
    expected = serve(engine, {"kept": kept})
    prepared = engine.prepare(PROMPTS[0], sampling(0), RequestOptions(kv_precision="bf16"))
    num_interrupts = 0
    for _ in range(12):
        kept = engine.queue(kept_one)
        engine.step()
        before = list(engine.detokenizers)
        interrupts.num_left = rng.randrange(1, 1500)
        try:
            with interrupts.tracing():
                samples = engine.queue(prepared)
                for request in samples:
                    engine.abort(request)
        except KeyboardInterrupt:
            num_interrupts += 1
        others = [request for request in engine.detokenizers if request not in before]
        assert len(others) in (0, 2), "all samples of a prompt, or none"
        for request in others:
            engine.abort(request)
            assert request.status is RequestStatus.FINISHED
            assert request.finish_reason is FinishReason.ABORT
        assert serve(engine, {"kept": kept}) == expected
        forget(engine, {"kept": [*kept, *others]})
        check_integrity(engine.kv)
    assert num_interrupts > 3


@pytest.mark.parametrize("name", ["embed", "layer", "head", "commit"])
def test_a_result_that_is_lost_is_computed_again(make_engine, undisturbed, monkeypatch, name, caplog):
    """Of the programs of a step only `commit` takes the arena: behind it the array that the engine holds is gone."""
    engine, faults = make_engine(**SETTINGS), {5, 30}
    asked, begun, faulty_steps = enter(engine), itertools.count(1), []
    begin, finish = ModelRunner._begin, ModelRunner.finish

    def losing(program):
        def lose(*arguments):
            program(*arguments)
            raise ResultLost

        return lose

    def lose_results(patch, spec):
        programs = step_programs(spec)
        if name == "layer":
            patch.setattr(programs, "layers", {kind: losing(layer) for kind, layer in programs.layers.items()})
        else:
            patch.setattr(programs, name, losing(getattr(programs, name)))

    def faulty_begin(runner, spec, *arguments):
        if next(begun) not in faults:
            return begin(runner, spec, *arguments)
        with monkeypatch.context() as patch:
            lose_results(patch, spec)
            faulty_steps.append(begin(runner, spec, *arguments))
        return faulty_steps[-1]

    def faulty_finish(runner, step):
        with monkeypatch.context() as patch:
            if any(step is faulty for faulty in faulty_steps):
                lose_results(patch, step.spec)
            return finish(runner, step)

    monkeypatch.setattr(ModelRunner, "_begin", faulty_begin)
    monkeypatch.setattr(ModelRunner, "finish", faulty_finish)
    num_failures = 0
    while engine.has_unfinished:
        try:
            engine.step()
        except ResultLost:
            num_failures += 1
    assert num_failures == 2
    assert answers(engine, asked) == undisturbed
    check_integrity(engine.kv)
    said = [record.getMessage() for record in caplog.records if "made anew" in record.getMessage()]
    assert ["the KV arena was lost" in message for message in said] == [name == "commit"] * 2
