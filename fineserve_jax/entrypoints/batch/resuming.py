"""The rows that are left of a job that was interrupted."""

from collections.abc import Callable, Iterable, Iterator

from fineserve_jax.entrypoints.batch.delivery import Delivery
from fineserve_jax.entrypoints.batch.records import Record

NO_MORE = (-1, False)


def unanswered(records: Iterable[Record], delivery: Delivery, note_skipped: Callable[[bool], None]) -> Iterator[Record]:
    """The records of rows that no earlier run has answered.

    Args:
        records: of all rows, in the order of their places, the same as in the earlier runs.
        note_skipped: called for each of the others, with whether an error was written of it.
    """
    earlier = delivery.journal.done_earlier()
    seq, failed = next(earlier, NO_MORE)
    for record in records:
        if record.seq != seq:
            yield record
            continue
        note_skipped(failed)
        seq, failed = next(earlier, NO_MORE)  # at once, see `Journal.done_earlier`
        delivery.pass_over(record.seq)
