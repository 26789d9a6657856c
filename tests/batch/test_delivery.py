"""Each answer is written once; where the order of rows is wanted, whatever the order in which answers come."""

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st
from job_cases import OnStep, run_job, written
from stub_engine import StubEngine

from fineserve_jax.entrypoints.batch import delivery as delivery_module
from fineserve_jax.entrypoints.batch.answers import AnswerFile
from fineserve_jax.entrypoints.batch.delivery import OrderedDelivery
from fineserve_jax.entrypoints.batch.journal import Journal, journal_path


class Memory:
    """An output that is a list of lines."""

    path, end = "memory", 0

    def __init__(self):
        self.lines = []

    def write(self, line):
        self.lines.append(line)
        self.end += len(line)
        return self.end

    def sync(self):
        pass


@given(st.data())
def test_answers_come_in_the_order_of_rows_whatever_the_order_they_are_known_in(data):
    count = data.draw(st.integers(1, 40))
    output, journal = Memory(), Journal(None)
    delivery = OrderedDelivery(output, journal)
    expected, unanswered, seq = [], [], -1
    for _ in range(count):
        seq += data.draw(st.integers(1, 3))  # empty lines count
        kind = data.draw(st.sampled_from(["row", "row", "bad", "earlier"]))
        if kind == "earlier":
            delivery.pass_over(seq)
            continue
        expected.append(seq)
        if kind == "row":
            delivery.accept(seq)
            unanswered.append(seq)
        else:
            delivery.deliver(seq, True, b"%d\n" % seq)
        while unanswered and data.draw(st.booleans()):
            answered = unanswered.pop(data.draw(st.integers(0, len(unanswered) - 1)))
            delivery.deliver(answered, False, b"%d\n" % answered)
            before = unanswered[0] if unanswered else seq + 1
            assert output.lines == [b"%d\n" % one for one in expected if one < before]
        if data.draw(st.booleans()):
            delivery.save(now=True)
    for answered in data.draw(st.permutations(unanswered)):
        delivery.deliver(answered, False, b"%d\n" % answered)
    delivery.end_of_rows()
    delivery.save(now=True)
    assert output.lines == [b"%d\n" % one for one in expected]
    assert [row.seq for row in journal.in_output()] == expected
    assert journal.num_held == 0
    journal.close()


def test_answers_that_wait_are_kept_on_disk_not_in_memory(tmp_path):
    """The first of 20,000 rows is answered last; the others would take 40 MB."""
    with AnswerFile(tmp_path / "out") as answers:
        answers.begin()
        journal = Journal(tmp_path / "journal")
        delivery = OrderedDelivery(answers, journal)
        delivery.accept(0)
        line = b"x" * 2000 + b"\n"
        tracemalloc.start()
        for seq in range(1, 20_000):
            delivery.accept(seq)
            delivery.deliver(seq, False, line[: 1000 + seq % 1000] + b"\n")
            delivery.save()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 8 << 20
        assert (tmp_path / "out").stat().st_size == 0
        delivery.deliver(0, False, b"first\n")
        delivery.end_of_rows()
        delivery.save(now=True)
        journal.close()
    lengths = [len(found) for found in (tmp_path / "out").read_bytes().splitlines()]
    assert lengths == [5] + [1000 + seq % 1000 for seq in range(1, 20_000)]


@pytest.mark.parametrize("in_memory", [0, 1, 1024])
def test_answers_that_wait_are_not_lost_when_the_job_is_interrupted(tmp_path, monkeypatch, in_memory):
    monkeypatch.setattr(delivery_module, "HELD_IN_MEMORY", in_memory)
    rows = [{"id": i, "prompt": [5 + i], "max_tokens": 40 if i % 7 == 0 else 2} for i in range(40)]
    path = tmp_path / "out.jsonl"

    def interrupt(summary):
        if summary.answered > 3:
            raise KeyboardInterrupt

    summary = run_job(StubEngine(batch=4), rows, path, ordered=True, observers=[OnStep(interrupt)])
    answered, in_output = summary.answered, len(written(path))
    assert summary.interrupted
    assert in_output < answered
    sampled = summary.sampled_tokens
    summary = run_job(StubEngine(batch=4), rows, path, resume=True, ordered=True)
    assert summary.skipped == answered
    assert [row["id"] for row in written(path)] == list(range(40))
    assert sampled + summary.sampled_tokens == sum(row["output_tokens"] for row in written(path))
    assert journal_path(path).exists()
