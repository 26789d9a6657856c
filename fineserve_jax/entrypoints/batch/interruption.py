"""SIGINT, SIGTERM and SIGHUP end a job between two steps, with all it has so far written and noted."""

import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any, Self, TypeVar

T = TypeVar("T")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interruption:
    """Notes that the process was asked to end, as long as it is entered. The second request interrupts at once.

    Only the main thread gets signals; elsewhere, and for signals that are ignored, nothing changes.

    Attributes:
        signal: by which the process was asked first; None: it was not.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._waiting = False
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signal is not None

    def reading(self, items: Iterable[T]) -> Iterator[T]:
        """The items. While one is waited for, a signal raises `KeyboardInterrupt`: nobody knows when it will come."""
        remaining = iter(items)
        while True:
            self._waiting = True
            try:
                if self.signal is not None:
                    raise KeyboardInterrupt
                item = next(remaining)
            except StopIteration:
                return
            finally:
                self._waiting = False
            yield item

    def _note(self, number: int, frame: FrameType | None) -> None:
        again, self.signal = self.signal is not None, self.signal or number
        if again or self._waiting:
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if (before := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before.clear()
