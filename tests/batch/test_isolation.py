"""An engine that fails: rows go on in another one, and a row that makes it fail is found, reported, and no other."""

import logging
import random

import pytest
from job_cases import by_id, run_job, without_timing, written
from stub_engine import StubEngine

from fineserve_jax import FineServeError
from fineserve_jax.entrypoints.batch import JobObserver

ROWS = [
    {"id": i, "prompt": [5 + i, 7], "max_tokens": 4 + i % 7, "temperature": 1.0, "n": 1 + (i % 6 == 5)}
    for i in range(30)
]


class Fault(RuntimeError):
    pass


class Notes(JobObserver):
    def __init__(self):
        self.notes, self.outcomes = [], []

    def note(self, text):
        self.notes.append(text)

    def row(self, outcome):
        self.outcomes.append(outcome)


def answers(tmp_path, fails=None, rows=ROWS, max_retries=2, batch=8, name="out.jsonl"):
    """The answers of an engine that fails so, by id; the job's summary, and what it told."""
    engine, notes = StubEngine(batch, fails=fails), Notes()
    summary = run_job(engine, rows, tmp_path / name, max_retries=max_retries, observers=[notes])
    assert not engine.has_unfinished
    assert engine.detokenizers == {}
    assert summary.faults == len(notes.notes)
    return by_id(without_timing(written(tmp_path / name))), summary, notes


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL)


@pytest.fixture
def undisturbed(tmp_path):
    return answers(tmp_path, name="whole.jsonl")[0]


@pytest.mark.parametrize(("bad", "at_token"), [([0], 0), ([29], 2), ([3, 4], 2), ([0, 9, 27], 0)])
def test_a_row_that_makes_the_engine_fail_is_reported_and_the_others_are_answered(tmp_path, undisturbed, bad, at_token):
    def fails(running):
        if any(request.token_ids[0] - 5 in bad and request.num_output_tokens >= at_token for request in running):
            raise Fault("out of memory")

    found, summary, notes = answers(tmp_path, fails)
    assert {row for row in found if "error" in found[row]} == set(bad)
    for row in bad:
        assert found[row]["error"] == (
            "the engine fails with this row, in each of 3 attempts by itself: Fault: out of memory"
        )
    assert {row: found[row] for row in found if row not in bad} == {
        row: undisturbed[row] for row in undisturbed if row not in bad
    }
    assert (summary.answered, summary.error_kinds) == (30 - len(bad), {"engine_fault": len(bad)})
    # To find one of the eight rows that run together takes three halvings, and then it is tried three times.
    assert summary.faults <= len(bad) * (1 + 3 + 3)
    assert notes.notes[0].endswith(" rows: Fault: out of memory; they are tried again")
    assert max(outcome.attempts for outcome in notes.outcomes) > 1


@pytest.mark.parametrize("seed", [2, 4])
def test_faults_that_pass_cost_no_row(tmp_path, undisturbed, seed):
    """Each of many steps fails with a probability of one in ten, whoever is computed."""
    chance = random.Random(seed)

    def fails(running):
        if chance.random() < 0.1:
            raise Fault("once")

    found, summary, _ = answers(tmp_path, fails, max_retries=50)
    assert found == undisturbed
    assert summary.errors == 0
    assert summary.faults > 0


def test_no_retries_means_that_a_single_fault_is_enough(tmp_path):
    tried = []

    def fails(running):
        if any(request.token_ids[0] == 5 for request in running):
            tried.append(len(running))
            raise Fault("it")

    found, _, _ = answers(tmp_path, fails, max_retries=0)
    assert found[0]["error"] == "the engine fails with this row, in each of 1 attempts by itself: Fault: it"
    assert tried.count(1) == 1


def test_too_many_rows_at_a_time_are_served_fewer_at_a_time(tmp_path, undisturbed):
    """As where memory is short for all of them together."""

    def fails(running):
        if len(running) > 3:
            raise Fault("RESOURCE_EXHAUSTED")

    found, summary, _ = answers(tmp_path, fails)
    assert found == undisturbed
    assert summary.faults <= 30


def test_an_engine_that_always_fails_ends_the_job_and_blames_nobody(tmp_path):
    def fails(running):
        raise Fault("no device")

    with pytest.raises(FineServeError, match=r"the engine fails with every row that it is given: Fault: no device"):
        answers(tmp_path, fails)
    assert written(tmp_path / "out.jsonl") == []
    summary = run_job(StubEngine(), ROWS, tmp_path / "out.jsonl", resume=True)
    assert (summary.answered, summary.errors) == (30, 0)


def test_an_engine_that_cannot_go_on_ends_the_job(tmp_path, monkeypatch):
    def fails(running):
        raise Fault("it")

    def recover(self):
        raise MemoryError("no room")

    monkeypatch.setattr(StubEngine, "recover", recover)
    with pytest.raises(FineServeError, match=r"has failed: Fault: it; it cannot go on: no room; .*--resume"):
        run_job(StubEngine(fails=fails), ROWS, tmp_path / "out.jsonl")


def test_answers_are_kept_though_the_engine_cannot_be_left_cleanly(tmp_path, monkeypatch):
    def recover(self):
        raise MemoryError("no room")

    monkeypatch.setattr(StubEngine, "recover", recover)
    assert run_job(StubEngine(), ROWS, tmp_path / "out.jsonl").answered == 30
    summary = run_job(StubEngine(), ROWS, tmp_path / "out.jsonl", resume=True)
    assert (summary.answered, summary.skipped) == (0, 30)


def test_a_single_row_that_fails_is_reported_though_no_other_succeeds(tmp_path):
    def fails(running):
        raise Fault("it")

    found, summary, _ = answers(tmp_path, fails, rows=ROWS[:1])
    assert "the engine fails with this row" in found[0]["error"]
    assert summary.errors == 1


def test_rows_that_fail_at_different_places_are_found_whatever_the_order(tmp_path):
    chance = random.Random(3)
    places = {i: chance.randrange(4) for i in chance.sample(range(30), 5)}

    def fails(running):
        if any(places.get(request.token_ids[0] - 5, 99) <= request.num_output_tokens for request in running):
            raise Fault("it")

    found, summary, _ = answers(tmp_path, fails)
    assert {row for row in found if "error" in found[row]} == set(places)
    assert summary.answered == 25
