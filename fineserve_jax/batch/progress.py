"""How far a batch job has come: a bar on a terminal, a line now and then elsewhere."""

import contextlib
import time
from collections.abc import Callable
from typing import Protocol, Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

LINE_EVERY_S = 10.0


class Reporter(Protocol):
    """Told after every step, and once at the end."""

    def update(self, rows: int, output_tokens: int) -> None:
        """`rows` are done, and `output_tokens` were sampled, in all."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def reporter(stream: TextIO, total: int | None, plain: bool = False) -> Reporter:
    """A bar if `stream` is a terminal, else lines. `total`: rows, if known; `plain`: lines in any case."""
    return Lines(stream, total) if plain or not stream.isatty() else Bar(stream, total)


class Bar:
    """Rich's progress bar, with tokens per second."""

    def __init__(self, stream: TextIO, total: int | None) -> None:
        columns = (
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[rate]}"),
        )
        self._progress = Progress(*columns, console=Console(file=stream), transient=True)
        self._task = self._progress.add_task("", total=total, rate="")
        self._rate = Rate(time.monotonic)

    def update(self, rows: int, output_tokens: int) -> None:
        rate = self._rate.after(output_tokens)
        self._progress.update(self._task, completed=rows, rate=f"{rate:.0f} tokens/s")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class Lines:
    """A line every ten seconds and one at the end."""

    def __init__(self, stream: TextIO, total: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._of = "" if total is None else f" of {total}"
        self._rate, self._last_s = Rate(clock), clock()
        self._latest, self._told = (0, 0), (-1, -1)

    def update(self, rows: int, output_tokens: int) -> None:
        self._latest = (rows, output_tokens)
        if self._clock() - self._last_s >= LINE_EVERY_S:
            self._tell()

    def _tell(self) -> None:
        self._last_s, self._told = self._clock(), self._latest
        rows, tokens = self._latest
        rate = self._rate.after(tokens)
        with contextlib.suppress(OSError):  # whoever read it has gone: no reason to end the job
            print(
                f"{rows}{self._of} rows, {tokens} output tokens, {rate:.0f} tokens/s",
                file=self._stream,
                flush=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._told != self._latest:
            self._tell()


class Rate:
    """Tokens per second since it was made."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._start_s = clock, clock()

    def after(self, tokens: int) -> float:
        return tokens / max(self._clock() - self._start_s, 1e-9)
