"""Whatever ends a job, and however often, it goes on with every row answered once, as if nothing had happened."""

import json
import os
import random
import signal
import sqlite3
import time
from pathlib import Path

import pytest
from job_cases import without_timing, written
from stub_engine import StubEngine
from stub_jobs import start, write_rows

from fineserve_jax.entrypoints.batch import run_batch
from fineserve_jax.entrypoints.batch.journal import journal_path

ROWS = 200


@pytest.fixture
def undisturbed(tmp_path):
    """The rows of a job that nothing disturbs, by id."""
    write_rows(tmp_path / "in.jsonl", ROWS)
    process = start(tmp_path / "in.jsonl", tmp_path / "whole.jsonl", step_s=0.0)
    process.join(60)
    assert process.exitcode == 0
    return by_id(written(tmp_path / "whole.jsonl"))


def by_id(rows):
    """Each row once."""
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in without_timing(rows)}


def run_until_it_ends(tmp_path, stop, attempts=60, **options):
    """Starts the job again and again; `stop` ends each process or waits for it. Returns how often it was started."""
    for attempt in range(attempts):
        process = start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=attempt > 0, **options)
        stop(process, attempt)
        process.join(60)
        if process.exitcode == 0:
            return attempt + 1
    raise AssertionError("the job does not end")


@pytest.mark.parametrize("ordered", [False, True])
def test_a_job_that_is_killed_twenty_times_answers_every_row_once(tmp_path, undisturbed, ordered):
    chance = random.Random(ordered)
    log = tmp_path / "sampled"

    def kill(process, attempt):
        if attempt < 20:
            process.join(chance.uniform(0.02, 0.25))
            process.kill()

    starts = run_until_it_ends(tmp_path, kill, log=log, ordered=ordered)
    assert starts > 5
    rows = written(tmp_path / "out.jsonl")
    assert by_id(rows) == undisturbed
    if ordered:
        assert [row["id"] for row in rows] == [f"row {i}" for i in range(ROWS)]
    sampled = log.read_text().splitlines()
    needed = sum(row.get("output_tokens", 0) for row in undisturbed.values())
    # A kill costs the tokens of its last moments: some 10 ms of 135 (see test_reproducible_jobs for longer lives).
    assert needed <= len(sampled) < 1.25 * needed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_job_cleanly_and_no_token_is_sampled_twice(tmp_path, undisturbed, number):
    chance = random.Random(int(number))
    log, statuses = tmp_path / "sampled", []

    def interrupt(process, attempt):
        before = size_of(log)
        while process.is_alive() and size_of(log) == before:
            time.sleep(0.005)  # it has begun
        if attempt < 3:
            process.join(chance.uniform(0.01, 0.1))
            if process.is_alive():
                os.kill(process.pid, number)
        process.join(60)
        statuses.append(process.exitcode)

    run_until_it_ends(tmp_path, interrupt, log=log, commit_every_s=1e9)
    assert statuses.count(3) >= 2
    assert statuses[-1] == 0
    assert by_id(written(tmp_path / "out.jsonl")) == undisturbed
    assert len(log.read_text().splitlines()) == sum(row.get("output_tokens", 0) for row in undisturbed.values())


def size_of(path):
    return path.stat().st_size if path.exists() else 0


def test_a_job_that_is_killed_before_any_row_is_complete_still_ends(tmp_path):
    """Every row takes longer than its process lives."""
    write_rows(tmp_path / "in.jsonl", 8, max_tokens=100)

    def kill(process, attempt):
        process.join(0.2)
        process.kill()

    starts = run_until_it_ends(tmp_path, kill, step_s=0.01)
    assert starts > 3
    assert {row["output_tokens"] for row in written(tmp_path / "out.jsonl")} == {100, 200}


def test_a_full_disk_ends_a_job_and_more_room_lets_it_go_on(tmp_path, undisturbed):
    room = (tmp_path / "whole.jsonl").stat().st_size // 12

    def wait(process, attempt):
        process.join(60)
        if process.exitcode == 2:
            error = (tmp_path / "out.jsonl.error").read_text()
            assert "cannot write to" in error
            assert "make room and run the same command with --resume" in error

    def room_of(attempt):
        return room * (attempt + 1) if attempt < 10 else None

    for attempt in range(30):
        process = start(
            tmp_path / "in.jsonl",
            tmp_path / "out.jsonl",
            step_s=0.0,
            resume=(tmp_path / "out.jsonl").exists(),
            max_file_bytes=room_of(attempt),
        )
        wait(process, attempt)
        if process.exitcode == 0:
            break
        for line in (tmp_path / "out.jsonl").read_text().splitlines() if (tmp_path / "out.jsonl").exists() else []:
            json.loads(line)
    assert attempt > 2
    assert by_id(written(tmp_path / "out.jsonl")) == undisturbed


def test_a_second_process_is_refused_while_the_first_lives_and_takes_over_when_it_is_dead(tmp_path, undisturbed):
    first = start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", step_s=0.05)
    while not journal_path(tmp_path / "out.jsonl").exists():
        time.sleep(0.005)
    for options in ({"resume": True}, {"overwrite": True}):
        second = start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", **options)
        second.join(60)
        assert second.exitcode == 2
        error = (tmp_path / "out.jsonl.error").read_text()
        assert f"process {first.pid} on " in error
        assert "is writing" in error
    first.kill()
    first.join()
    assert Path(f"{tmp_path / 'out.jsonl'}.lock").exists()
    third = start(tmp_path / "in.jsonl", tmp_path / "out.jsonl", resume=True, step_s=0.0)
    third.join(60)
    assert third.exitcode == 0
    assert by_id(written(tmp_path / "out.jsonl")) == undisturbed
    assert not Path(f"{tmp_path / 'out.jsonl'}.lock").exists()


@pytest.mark.parametrize("damage", ["tail lost", "tail of zeros", "end torn", "more than was noted"])
def test_what_a_loss_of_power_takes_of_the_output_is_computed_again(tmp_path, undisturbed, damage):
    """The journal may have reached the disk before the output; up to `durable_bytes` both have."""
    path = tmp_path / "out.jsonl"
    process = start(tmp_path / "in.jsonl", path, step_s=0.01)
    while size_of(path) < 8000:
        time.sleep(0.005)
    process.kill()
    process.join()
    content = path.read_bytes()
    set_durable(path, len(content) // 4)
    cut = len(content) * 2 // 3
    if damage == "tail lost":
        path.write_bytes(content[:cut])
    elif damage == "tail of zeros":
        path.write_bytes(content[:cut] + bytes(len(content) - cut))
    elif damage == "end torn":
        path.write_bytes(content[:-5])
    else:
        path.write_bytes(content + b'{"id": "row 199", "text": "t')
    process = start(tmp_path / "in.jsonl", path, resume=True, step_s=0.0)
    process.join(60)
    assert process.exitcode == 0
    assert by_id(written(path)) == undisturbed


def set_durable(path, size):
    with sqlite3.connect(journal_path(path)) as journal:
        journal.execute("UPDATE job SET value = ? WHERE name = 'durable_bytes'", (str(size),))
    journal.close()


def test_a_job_in_this_process_leaves_signals_as_they_were(tmp_path):
    write_rows(tmp_path / "in.jsonl", 3)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    run_batch("stub", tmp_path / "in.jsonl", tmp_path / "out.jsonl", make_engine=StubEngine)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before
    assert len(written(tmp_path / "out.jsonl")) == 3
