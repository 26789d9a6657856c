"""From answers to the output and the journal: each row once, in any order or in that of the rows."""

import heapq
import time
import zlib
from collections.abc import Callable

from fineserve_jax.entrypoints.batch.answers import AnswerFile
from fineserve_jax.entrypoints.batch.journal import Journal, WrittenRow

SYNC_EVERY_S = 5.0
HELD_IN_MEMORY = 1024


class Delivery:
    """Writes answers as they come, and notes them in the journal.

    Args:
        answers: begun.
        journal: of that output.
        clock: seconds, monotonic.
    """

    def __init__(self, answers: AnswerFile, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        self.answers, self.journal, self._clock = answers, journal, clock
        self._synced_s = clock()

    def accept(self, seq: int) -> None:
        """A row was read whose answer will come."""

    def pass_over(self, seq: int) -> None:
        """A row was read that was answered in an earlier run."""

    def deliver(self, seq: int, failed: bool, line: bytes) -> None:
        """The answer to a row, as a line. `failed`: whether it is an error."""
        self._write(seq, failed, line)

    def end_of_rows(self) -> None:
        """No row follows, and all were delivered."""

    def save(self, now: bool = False) -> None:
        """Commits the journal if that is due, or in any case; syncs the output now and then.

        Raises:
            FineServeError: the disk is full, or fails.
        """
        if not now and not self.journal.is_due:
            return
        if now or self._clock() - self._synced_s >= SYNC_EVERY_S:
            self.answers.sync()
            self.journal.set("durable_bytes", self.answers.end)
            self._synced_s = self._clock()
        self.journal.commit()

    def _write(self, seq: int, failed: bool, line: bytes) -> None:
        end = self.answers.write(line)
        self.journal.note_written(WrittenRow(seq, failed, end, zlib.crc32(line)))


class OrderedDelivery(Delivery):
    """Writes answers in the order of their rows. Those that must wait are kept in the journal, not in memory.

    A row may be written when no row before it is unanswered; rows are read in their order, so that only those which
    were read and are not answered count.
    """

    def __init__(self, answers: AnswerFile, journal: Journal, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(answers, journal, clock)
        self._open: set[int] = set()  # read, and not answered
        self._order: list[int] = []  # a heap of those, and of some that were answered meanwhile
        self._memory: list[tuple[int, bool, bytes]] = []  # a heap of answers that wait
        self._next = 0  # no row before it is still to be read

    def accept(self, seq: int) -> None:
        self._next = seq + 1
        self._open.add(seq)
        heapq.heappush(self._order, seq)

    def pass_over(self, seq: int) -> None:
        self._open.discard(seq)
        self._next = max(self._next, seq + 1)
        self._write_ready()

    def deliver(self, seq: int, failed: bool, line: bytes) -> None:
        self._open.discard(seq)
        self._next = max(self._next, seq + 1)
        heapq.heappush(self._memory, (seq, failed, line))
        self._write_ready()
        if len(self._memory) > HELD_IN_MEMORY:
            self._spill()

    def end_of_rows(self) -> None:
        self._next = 1 << 62
        self._write_ready()

    def save(self, now: bool = False) -> None:
        if now or self.journal.is_due:
            self._spill()
        super().save(now)

    def _write_ready(self) -> None:
        while self._order and self._order[0] not in self._open:
            heapq.heappop(self._order)
        if len(self._order) > 2 * len(self._open) + HELD_IN_MEMORY:
            self._order = sorted(self._open)
        before = min(self._order[0], self._next) if self._order else self._next
        if self.journal.num_held:
            self._spill()
            for answer in self.journal.take_held(before):
                self._write(*answer)
            return
        while self._memory and self._memory[0][0] < before:
            self._write(*heapq.heappop(self._memory))

    def _spill(self) -> None:
        for answer in self._memory:
            self.journal.hold(*answer)
        self._memory.clear()
