"""What comes before the engine: ids are given to rows, and errors written of those that cannot be answered."""

from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows, as_line
from fineserve_jax.entrypoints.batch.delivery import Delivery
from fineserve_jax.entrypoints.batch.job_output import told_key
from fineserve_jax.entrypoints.batch.journal import ADOPTED
from fineserve_jax.entrypoints.batch.observers import Observers, RowOutcome
from fineserve_jax.entrypoints.batch.records import SEQ_BITS
from fineserve_jax.entrypoints.batch.row_ids import id_key
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.validation import shown


class Intake:
    """The rows of a job, as they are read.

    Args:
        delivery: where answers go.
        answer_rows: forms the errors.
        summary, observers: told of them.
    """

    def __init__(
        self, delivery: Delivery, answer_rows: AnswerRows, summary: BatchSummary, observers: Observers
    ) -> None:
        self.delivery, self._answer_rows, self._summary, self._observers = delivery, answer_rows, summary, observers
        self._goes_by_errors = bool(delivery.journal.get("adopted_bytes"))

    def admits(self, row: BatchRow) -> bool:
        """Whether a row is to be answered, which then has its id. Else it was before, or an error is written of it."""
        first = self.delivery.journal.claim(id_key(row.id), row.seq)
        if first == ADOPTED:
            self._summary.note_skipped()
            self.delivery.pass_over(row.seq)
        elif first is not None:
            self.fail(_duplicate(row, first))
        else:
            self.delivery.accept(row.seq)
        return first is None

    def fail(self, bad: BadRow) -> None:
        """Writes an error, unless an earlier run has. The row's id, perhaps only its line, is free for a good row."""
        self._summary.note_error(bad.code)
        row = self._answer_rows.error(bad)
        if self._goes_by_errors:
            key = told_key(bad.line, bad.error, row.get("file"))
            if self.delivery.journal.claim(key, bad.seq) == ADOPTED:
                self.delivery.pass_over(bad.seq)
                return
        self.delivery.deliver(bad.seq, True, as_line(row))
        self._observers.row(RowOutcome(bad.seq, bad.id, bad.line, bad.file, bad.error, bad.code))


def bad_row(row: BatchRow, error: str, code: str = "invalid_request") -> BadRow:
    """A row that turned out to be one."""
    return BadRow(row.line, row.id, error, code, row.form, row.file)


def _duplicate(row: BatchRow, first: int) -> BadRow:
    whose = f"line {first & ((1 << SEQ_BITS) - 1)}"
    if first >> SEQ_BITS != row.file:
        whose += f" of input {(first >> SEQ_BITS) + 1}"
    error = f"id {shown(row.id)} is that of {whose}; give every row an id of its own, or none"
    return bad_row(row, error, "duplicate_id")
