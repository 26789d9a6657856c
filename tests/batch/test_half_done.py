"""Rows that were interrupted in the middle go on with the tokens they had, on a real engine with a tiny model."""

import time

import pytest
from job_cases import OnStep, by_id, run_job, without_timing, written

from fineserve_jax.engine.resuming import SampleSoFar
from fineserve_jax.entrypoints.batch.in_flight import RowInFlight, save_tokens, saved_tokens
from fineserve_jax.entrypoints.batch.journal import Journal
from fineserve_jax.entrypoints.batch.requests import RowRequests
from fineserve_jax.entrypoints.batch.rows import BatchRow

LONG = {"max_tokens": 40, "ignore_eos": True}
ROWS = [
    {"id": "greedy", "prompt": "one two three", **LONG},
    {"id": "random", "prompt": "four five", "temperature": 1.0, **LONG},
    {"id": "penalties", "prompt": "aaaa", "repetition_penalty": 1.3, "frequency_penalty": 0.5, **LONG},
    {"id": "samples", "prompt": "a prompt of several pages, of sixteen tokens", "n": 3, "temperature": 1.5, **LONG},
    {"id": "logprobs", "prompt": "six", "logprobs": 2, "kv_precision": "int8", **LONG},
    {"id": "stops", "prompt": "seven", "temperature": 2.0, "stop": ["a", "e", "Q"], "min_tokens": 9, "max_tokens": 60},
    {"id": "filters", "prompt": [9, 9, 9], "temperature": 0.9, "top_p": 0.8, "top_k": 20, "seed": 11, **LONG},
]


@pytest.fixture(scope="module")
def undisturbed(engine, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "out.jsonl"
    run_job(engine, ROWS, path)
    return by_id(without_timing(written(path)))


@pytest.mark.parametrize("every", [1, 7, 16])
def test_rows_that_are_interrupted_again_and_again_give_the_same_answers(engine, tmp_path, undisturbed, every):
    """The same tokens, texts, log-probabilities to some digits, and formats."""
    path, steps, sampled, runs = tmp_path / "out.jsonl", 0, 0, 0

    def interrupt(summary):
        nonlocal steps
        steps += 1
        if steps % every == 0 and runs < 12:
            raise KeyboardInterrupt

    while True:
        summary = run_job(engine, ROWS, path, resume=runs > 0, observers=[OnStep(interrupt)])
        runs, sampled = runs + 1, sampled + summary.sampled_tokens
        assert not engine.has_unfinished
        assert engine.detokenizers == {}
        if not summary.interrupted:
            break
    assert runs > 3
    assert sampled == sum(row["output_tokens"] for row in undisturbed.values())
    assert_same(by_id(without_timing(written(path))), undisturbed)


def assert_same(found, undisturbed):
    assert found.keys() == undisturbed.keys()
    for row, whole in ((found[name], undisturbed[name]) for name in undisturbed):
        entries = zip(row.pop("logprobs", ()), whole.get("logprobs", ()), strict=True)
        for entry, expected in entries:
            assert (entry["token"], entry["text"]) == (expected["token"], expected["text"])
            assert entry["logprob"] == pytest.approx(expected["logprob"], abs=1e-3)
        assert row == {name: value for name, value in whole.items() if name != "logprobs"}


def test_a_row_with_which_the_engine_fails_is_found_and_the_others_go_on(engine, tmp_path, undisturbed, monkeypatch):
    """A step fails before it computes anything, and sometimes behind all it computes."""
    begin, faults = engine.runner.begin, []

    def fail(output, behind=None):
        is_bad = any(chunk.request.token_ids[:3] == [9, 9, 9] for chunk in output.chunks)
        result = begin(output, behind) if not is_bad or len(faults) % 2 else None
        if is_bad:
            faults.append(len(output.chunks))
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return result

    monkeypatch.setattr(engine.runner, "begin", fail)
    summary = run_job(engine, ROWS, tmp_path / "out.jsonl", max_retries=1)
    found = by_id(without_timing(written(tmp_path / "out.jsonl")))
    error = found.pop("filters")["error"]
    assert error.startswith(
        "the engine fails with this row, in each of 2 attempts by itself: RuntimeError: RESOURCE_EXH"
    )
    assert_same(found, {name: row for name, row in undisturbed.items() if name != "filters"})
    assert (summary.answered, summary.errors, summary.faults) == (6, 1, len(faults))
    assert not engine.has_unfinished


def test_a_sample_that_had_ended_is_finished_at_once(engine):
    requests = RowRequests({"max_tokens": 6, "ignore_eos": True})
    prepared = engine.prepare(*requests.request(BatchRow(1, 1, prompt="abc", sampling={"n": 2}), engine.tokenizer))
    whole = engine.queue(prepared)
    while engine.has_unfinished:
        engine.step()
    expected = engine.output(whole)
    for sample in whole:
        engine.release(sample)
    had = [SampleSoFar(sample.output_token_ids, (), sample.kv_tokens) for sample in whole]
    again = engine.queue(prepared, had)
    assert not engine.has_unfinished
    found = engine.output(again)
    assert (found.outputs, found.kv_tokens) == (expected.outputs, expected.kv_tokens)
    for sample in again:
        engine.release(sample)


@pytest.mark.parametrize(("cost_s", "interval_s"), [(0.0, 0.1), (0.0005, 0.1), (0.004, 0.4), (1.0, 2.0)])
def test_commits_are_as_frequent_as_a_hundredth_of_the_time_allows(monkeypatch, cost_s, interval_s):
    now_s = cpu_s = 0.0
    monkeypatch.setattr(time, "thread_time", lambda: cpu_s)
    journal = Journal(None, clock=lambda: now_s)
    with journal.counted():
        cpu_s += cost_s
    now_s += 5.0
    assert journal.is_due
    journal.commit()
    for _ in range(3):
        now_s += interval_s / 4
        assert not journal.is_due
    now_s += interval_s / 3
    assert journal.is_due
    journal.commit()
    now_s += 0.11
    assert journal.is_due, "what a commit has cost delays the next, and no others"
    journal.close()


def test_what_the_journal_keeps_of_samples_comes_back_as_it_was(engine):
    journal = Journal(None)
    row = BatchRow(3, "x", prompt="abc", sampling={"n": 2, "logprobs": 1, "temperature": 1.0, "max_tokens": 9})
    request = RowRequests().request(row, engine.tokenizer)
    pending = RowInFlight(row, engine.queue(engine.prepare(*request)), [0, 0])
    try:
        for _ in range(4):
            engine.step()
            save_tokens(journal, [pending])
            save_tokens(journal, [pending])
        kept = saved_tokens(journal, row.seq)
        assert [part.token_ids for part in kept] == [sample.output_token_ids for sample in pending.samples]
        assert [part.logprobs for part in kept] == [sample.logprobs for sample in pending.samples]
        assert saved_tokens(journal, row.seq + 1) == []
    finally:
        for sample in pending.samples:
            engine.abort(sample)
            engine.release(sample)
        journal.close()
