"""How far a batch job has come: a bar on a terminal, a line of names and values now and then elsewhere."""

import contextlib
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.observers import JobObserver, JobStart
from fineserve_jax.entrypoints.batch.summary import BatchSummary

LINE_EVERY_S = 10.0
WINDOW_S = 60.0


class Reporter(JobObserver):
    """An observer that shows what it is told as long as it is entered."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


def reporter(stream: TextIO, plain: bool = False) -> Reporter:
    """A bar if `stream` is a terminal, else lines. `plain`: lines in any case."""
    return Lines(stream) if plain or not stream.isatty() else Bar(stream)


class Bar(Reporter):
    """Rich's progress bar, with tokens per second, the time that is left, errors, and the KV memory in use."""

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        columns = (
            TextColumn("rows"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[told]}"),
        )
        self._progress = Progress(*columns, console=Console(file=stream), transient=True)
        self._task = self._progress.add_task("", total=None, told="")
        self._pace = Pace(clock)

    def began(self, start: JobStart) -> None:
        self._pace.num_rows = start.num_rows
        self._progress.update(self._task, total=start.num_rows)

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        self._pace.note(summary)
        told = [f"{self._pace.tokens_per_s:.0f} tokens/s"]
        if (left_s := self._pace.left_s(summary)) is not None:
            told.append(f"{duration(left_s)} left")
        if summary.errors:
            told.append(f"[red]{summary.errors} errors[/red]")
        told += [f"{name} {share:.0%}" for name, share in occupancy(stats).items()]
        self._progress.update(self._task, completed=summary.rows, told=", ".join(told))

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, style="yellow")

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()


class Lines(Reporter):
    """A line every ten seconds and one at the end, such as

    time=2026-01-01T01:02:03+00:00 rows=5 of=8 errors=1 output_tokens=120 tokens_per_s=12 left_s=9 kv_int8=0.41
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream, clock
        self._pace, self._last_s = Pace(clock), clock()
        self._stats: EngineStats | None = None

    def began(self, start: JobStart) -> None:
        self._pace.num_rows = start.num_rows

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        self._pace.note(summary)
        self._stats = stats
        if self._clock() - self._last_s >= LINE_EVERY_S:
            self._tell(summary)

    def note(self, text: str) -> None:
        self._write({"note": f'"{text}"'})

    def ended(self, summary: BatchSummary) -> None:
        self._pace.note(summary)
        self._tell(summary)

    def _tell(self, summary: BatchSummary) -> None:
        self._last_s = self._clock()
        told: dict[str, object] = {"rows": summary.rows}
        if self._pace.num_rows is not None:
            told["of"] = self._pace.num_rows
        told |= {"errors": summary.errors, "output_tokens": summary.sampled_tokens}
        told["tokens_per_s"] = round(self._pace.tokens_per_s)
        if (left_s := self._pace.left_s(summary)) is not None:
            told["left_s"] = round(left_s)
        if self._stats is not None:
            told |= {f"kv_{name}": f"{share:.2f}" for name, share in occupancy(self._stats).items()}
        self._write(told)

    def _write(self, told: dict[str, object]) -> None:
        now = datetime.now(UTC).isoformat(timespec="seconds")
        with contextlib.suppress(OSError):  # whoever read it has gone: no reason to end the job
            print(f"time={now}", *(f"{name}={value}" for name, value in told.items()), file=self._stream, flush=True)


class Pace:
    """How fast tokens are sampled, over the last minute, and how long the rest takes at that pace.

    Rows that are not answered yet are expected to get as many tokens as those that are have got on average.

    Attributes:
        num_rows: of the job; None if unknown.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self.num_rows = clock, None
        self._seen = deque([(clock(), 0)])  # seconds and tokens

    num_rows: int | None

    def note(self, summary: BatchSummary) -> None:
        """Takes down where the job stands."""
        now = self._clock()
        if now - self._seen[-1][0] >= 0.2 or len(self._seen) == 1:
            self._seen.append((now, summary.sampled_tokens))
        else:
            self._seen[-1] = (now, summary.sampled_tokens)
        while len(self._seen) > 2 and now - self._seen[1][0] >= WINDOW_S:
            self._seen.popleft()

    @property
    def tokens_per_s(self) -> float:
        (first_s, first), (last_s, last) = self._seen[0], self._seen[-1]
        return (last - first) / max(last_s - first_s, 1e-9)

    def left_s(self, summary: BatchSummary) -> float | None:
        """Seconds that the rest takes; None while nothing is known of it."""
        ended = summary.answered + summary.errors
        rate = self.tokens_per_s
        if self.num_rows is None or not summary.answered or rate <= 0:
            return None
        expected = (self.num_rows - summary.rows) * summary.output_tokens / ended
        begun = summary.sampled_tokens - summary.output_tokens  # tokens of rows that are half done
        return max(0.0, expected - begun) / rate


def occupancy(stats: EngineStats) -> dict[str, float]:
    """Of the KV memory, the share that each KV format holds; those that hold none are left out."""
    held = {name: usage.reserved_bytes / max(stats.kv_bytes, 1) for name, usage in stats.kv.items()}
    return {name: share for name, share in held.items() if share}


def duration(seconds: float) -> str:
    """Seconds for people: "1:02:03", or "2:03"."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
