"""What the report of a batch job is drawn from: kept while it runs, in memory that does not grow with the job."""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.observers import JobObserver, JobStart, RowOutcome
from fineserve_jax.entrypoints.batch.summary import BatchSummary

MOST_SAMPLES = 240
"""Of the series over time. When there are more, every second one is dropped, and from then on half as many are kept."""
FIRST_INTERVAL_S = 0.25
STEPS_PER_DOUBLING = 16
"""Of the distributions: values in a bucket differ by 4 % at most."""


@dataclass(frozen=True, slots=True)
class Sample:
    """How a job stood at a moment.

    Attributes:
        time_s: since it began.
        output_tokens, prompt_tokens: so far.
        rows: done so far.
        kv_shares: KV format -> share of the memory that its cached tokens need.
    """

    time_s: float
    output_tokens: int
    prompt_tokens: int
    rows: int
    running: int
    waiting: int
    kv_shares: Mapping[str, float]


@dataclass(slots=True)
class Distribution:
    """How often values of about each size came, in buckets that grow with the values."""

    counts: Counter[int] = field(default_factory=Counter)
    zeros: int = 0

    def note(self, value: float) -> None:
        if value > 0:
            self.counts[math.floor(STEPS_PER_DOUBLING * math.log2(value))] += 1
        else:
            self.zeros += 1

    @property
    def total(self) -> int:
        return self.zeros + self.counts.total()

    def cumulative(self) -> list[tuple[float, float]]:
        """(upper end of a bucket, share of values under it), in order."""
        points, seen = [], self.zeros
        for bucket in sorted(self.counts):
            seen += self.counts[bucket]
            points.append((2 ** ((bucket + 1) / STEPS_PER_DOUBLING), seen / self.total))
        return points

    def quantile(self, share: float) -> float:
        """A value that this share of all values are at most; 0 if there are none."""
        return next((value for value, below in self.cumulative() if below >= share), 0.0)


@dataclass(slots=True)
class ErrorKind:
    """Rows that failed alike, and the first of them."""

    count: int
    example: RowOutcome


class BatchRecord(JobObserver):
    """Notes what a report tells of a job.

    Args:
        clock: seconds, monotonic.

    Attributes:
        has_begun: whether there is anything to report.
        start: what was known before.
        summary: at the end; None while it runs.
        samples: over time.
        ttft_s, total_s, queue_s, s_per_token: latencies of answered rows.
        prompt_tokens, output_tokens: lengths, of rows and of samples.
        finish_reasons: of samples.
        errors: by their code.
        models: rows by the model that answered.
        notes: what people were told, the first few.
    """

    MOST_NOTES = 20

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._start_s, self._interval_s = clock, clock(), FIRST_INTERVAL_S
        self._last: tuple[float, BatchSummary, EngineStats] | None = None
        self.has_begun, self.start = False, JobStart(None)
        self.summary: BatchSummary | None = None
        self.samples: list[Sample] = []
        self.ttft_s, self.total_s, self.queue_s, self.s_per_token = (Distribution() for _ in range(4))
        self.prompt_tokens, self.output_tokens = Distribution(), Distribution()
        self.finish_reasons: Counter[str] = Counter()
        self.errors: dict[str, ErrorKind] = {}
        self.models: Counter[str] = Counter()
        self.notes: list[str] = []

    def began(self, start: JobStart) -> None:
        self.has_begun, self.start, self._start_s = True, start, self._clock()

    def row(self, outcome: RowOutcome) -> None:
        if outcome.error is not None:
            kind = self.errors.setdefault(outcome.code or "error", ErrorKind(0, outcome))
            kind.count += 1
            return
        self.models[outcome.model] += 1
        self.prompt_tokens.note(outcome.prompt_tokens)
        self.finish_reasons.update(outcome.finish_reasons)
        for count in outcome.output_tokens:
            self.output_tokens.note(count)
        if (metrics := outcome.metrics) is not None:
            self.ttft_s.note(metrics.ttft_s)
            self.total_s.note(metrics.total_s)
            self.queue_s.note(metrics.queue_s)
            if (most := max(outcome.output_tokens, default=0)) > 1:
                self.s_per_token.note((metrics.total_s - metrics.ttft_s) / (most - 1))

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        now_s = self._clock() - self._start_s
        self._last = now_s, summary, stats
        if not self.samples or now_s >= self.samples[-1].time_s + self._interval_s:
            self._sample(now_s, summary, stats)

    def note(self, text: str) -> None:
        if len(self.notes) < self.MOST_NOTES:
            self.notes.append(text)

    def ended(self, summary: BatchSummary) -> None:
        self.summary = summary
        if self._last is not None:
            self._sample(*self._last)

    def _sample(self, now_s: float, summary: BatchSummary, stats: EngineStats) -> None:
        shares = {name: part.needed_bytes / stats.kv_bytes for name, part in stats.kv.items() if part.needed_bytes}
        self.samples.append(
            Sample(
                now_s,
                summary.sampled_tokens,
                stats.num_prompt_tokens,
                summary.rows,
                stats.num_running,
                stats.num_waiting,
                shares,
            )
        )
        if len(self.samples) > MOST_SAMPLES:
            self.samples = self.samples[::2]
            self._interval_s *= 2


def rates(samples: Sequence[Sample], count: Callable[[Sample], int]) -> list[tuple[float, float]]:
    """(time, how much `count` grew a second since the sample before), from the second sample on."""
    pairs = itertools.pairwise(samples)
    return [(b.time_s, (count(b) - count(a)) / (b.time_s - a.time_s)) for a, b in pairs if b.time_s > a.time_s]


def told_options(options: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and values as text, those that are None left out."""
    return [(name, str(value)) for name, value in sorted(options.items()) if value is not None]
