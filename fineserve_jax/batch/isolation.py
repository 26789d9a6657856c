"""Which row breaks the engine: those that were computed when it failed are halved until one is left.

A group of suspects is served by itself until each of its rows has got a token, or has ended. Only a row that fails by
itself, more often than it may be retried, is to blame; and only if another one succeeds meanwhile, since an engine that
fails with whatever it gets is no row's fault.
"""

from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

from fineserve_jax.errors import FineServeError

MAX_ACCUSED = 3
"""Rows in turn that fail by themselves while nothing succeeds, until it is the engine that is to blame."""

FAULTS_TO_HALVE = 3
"""Faults without a culprit until fewer rows are served at a time, lest memory be too short for all together."""


class Suspect(Protocol):
    """A row; `faults` counts how often the engine failed with it alone."""

    faults: int


Row = TypeVar("Row", bound=Suspect)


class Isolation(Generic[Row]):
    """Says who may be served after faults.

    Args:
        max_retries: how often a row that fails by itself is tried again.

    Attributes:
        testing: the group that is being served by itself; empty if all may be served.
        row_limit: most rows to be served at a time; None if the engine's own limit does.
    """

    def __init__(self, max_retries: int = 2) -> None:
        self._max_retries = max_retries
        self.testing: list[Row] = []
        self.row_limit: int | None = None
        self._groups: list[list[Row]] = []  # to be tested, the next one last
        self._accused: list[tuple[Row, str]] = []
        self._unexplained = 0

    def fault(self, running: Sequence[Row], error: str) -> None:
        """The engine has failed.

        Args:
            running: whom it was serving, of a group under test those of it; not empty.
            error: what it said.

        Raises:
            FineServeError: it fails whatever it serves.
        """
        suspects = list(running)
        if not self.testing:
            self._note_unexplained(len(suspects))
        self.testing = []
        if len(suspects) > 1:
            half = len(suspects) // 2
            self._groups += [suspects[half:], suspects[:half]]
            return
        (row,) = suspects
        row.faults += 1
        if row.faults <= self._max_retries:
            self._groups.append([row])
            return
        self._accused.append((row, error))
        self._unexplained = 0
        if len(self._accused) == MAX_ACCUSED:
            raise FineServeError(
                f"the engine fails with every row that it is given: {error}; what is written is sound, so mend the "
                "cause and run the same command with --resume"
            )

    def _note_unexplained(self, running: int) -> None:
        self._unexplained += 1
        if self._unexplained > FAULTS_TO_HALVE and running > 1:
            self.row_limit, self._unexplained = running // 2, 0

    def next_group(self) -> list[Row]:
        """The next group to be served by itself, empty if all may be served."""
        self.testing = self._groups.pop() if self._groups else []
        return self.testing

    def passed(self) -> None:
        """The group under test has got on."""
        self.testing = []

    def convicted(self) -> list[tuple[Row, str]]:
        """Rows that are to blame, with what the engine said of each. Call it after something has succeeded."""
        accused, self._accused = self._accused, []
        return accused
