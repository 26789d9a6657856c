"""A reproducible job that is interrupted and resumed writes the very bytes of one that nothing has disturbed."""

import math
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from job_cases import OnStep
from reproducible_jobs import CONFIG, answer, write_rows
from stub_jobs import start_process
from tiny_model import OPTIONS

from fineserve_jax import Engine
from fineserve_jax.entrypoints.batch import journal, run_batch
from fineserve_jax.entrypoints.batch.journal import journal_path
from fineserve_jax.loaders import load_model


@pytest.fixture(scope="module")
def reproducible(tiny_model):
    return Engine(load_model(tiny_model, OPTIONS["weights"]), CONFIG)


class Ended(BaseException):
    """What a process that is killed does not live to see."""


def run(engine, source, target, **options):
    return run_batch("tiny", source, target, CONFIG, make_engine=lambda: engine, timing=False, **options)


def run_and_kill(engine, source, target, kept, after, resume):
    """Runs until a step, and keeps what `kill -9` would leave of the output and its journal then; whether it came so
    far."""
    steps = iter(range(after))

    def kill(summary):
        if next(steps, None) is None:
            kept.mkdir()
            for path in target.parent.glob(f"{target.name}*"):
                if not path.name.endswith(".lock"):
                    shutil.copy(path, kept)
            raise Ended

    try:
        run(engine, source, target, resume=resume, observers=[OnStep(kill)], ordered=target.name == "ordered.jsonl")
    except Ended:
        return True
    return False


@pytest.mark.parametrize("name", ["ordered.jsonl", "any.jsonl"])
def test_a_job_that_is_killed_and_resumed_gives_the_same_bytes(reproducible, tmp_path, name, monkeypatch):
    monkeypatch.setattr(journal, "MIN_INTERVAL_S", 0.005)  # some steps, at a pace at which a test can wait
    monkeypatch.setattr(journal, "MAX_INTERVAL_S", 0.005)
    chance, source, whole, target = random.Random(5), tmp_path / "in.jsonl", tmp_path / "whole", tmp_path / name
    write_rows(source, 24, 30)
    run(reproducible, source, whole, ordered=True)
    for number in range(4):
        kept = tmp_path / f"kept {number}"
        assert run_and_kill(reproducible, source, target, kept, chance.randint(20, 40), resume=number > 0)
        target = kept / name
        assert journal_path(target).exists()
    assert 0 < run(reproducible, source, target, resume=True, ordered=name == "ordered.jsonl").skipped < 24
    lines, expected = target.read_bytes(), whole.read_bytes()
    if name != "ordered.jsonl":
        lines, expected = sorted(lines.splitlines()), sorted(expected.splitlines())
    assert lines == expected


# -- processes that are really killed --------------------------------------------------------------------------


def size_of(path: Path) -> int:
    return int(path.read_bytes() or 0) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 20), (signal.SIGTERM, 5)])
def test_a_job_that_is_killed_often_gives_the_same_bytes_and_samples_little_twice(tiny_model, tmp_path, number, kills):
    """200 rows. The kills are spread over the job, so that on a quiet machine a process that is killed lives some two
    seconds after its first token; how many tokens were sampled, the engine says."""
    chance, source, target = random.Random(int(number)), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    write_rows(source, 200, 40)
    files = tiny_model, source

    def run_once(target, log, step_s, resume, most_tokens):
        process = start_process(answer, *files, target, log, step_s, resume)
        while process.is_alive() and size_of(log) < most_tokens:
            time.sleep(0.005)
        time.sleep(chance.uniform(0.0, 0.1))  # anywhere between two commits
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(60)
        return process.exitcode

    assert run_once(tmp_path / "whole.jsonl", tmp_path / "whole.log", 0.0, False, math.inf) == 0
    needed = size_of(tmp_path / "whole.log")
    logs, status, step_s = [], None, 0.02 if number == signal.SIGKILL else 0.0
    while status != 0:
        logs.append(tmp_path / f"{len(logs)}.log")
        most_tokens = chance.uniform(0.5, 1.4) * needed / (kills + 1) if len(logs) <= kills else math.inf
        status = run_once(target, logs[-1], step_s, len(logs) > 1, most_tokens)
        assert status in (0, -int(number) if number == signal.SIGKILL else 3)
    assert len(logs) == kills + 1
    assert target.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    sampled = sum(map(size_of, logs))
    print(f"sampled twice: {sampled / needed - 1:.2%} of {needed} tokens")
    assert needed <= sampled < (1.05 * needed if number == signal.SIGKILL else needed + 1)
