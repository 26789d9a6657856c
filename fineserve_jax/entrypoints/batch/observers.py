"""What a job tells while it runs: to progress on a terminal, to metrics, to reports.

An observer that fails ends no job: its error is logged, and it is told nothing more.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fineserve_jax.engine.outputs import RequestMetrics
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.row_ids import RowId
from fineserve_jax.entrypoints.batch.summary import BatchSummary

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobStart:
    """What is known before a job.

    Attributes:
        num_rows: of all inputs; None if unknown.
        inputs, output: their names.
        options: by name, see `identity.job_identity`.
    """

    num_rows: int | None
    inputs: tuple[str, ...] = ()
    output: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RowOutcome:
    """What became of a row.

    Attributes:
        seq: its place among all rows; `line` and `file` say it for people.
        error, code: why it was not answered, for people and for programs; None if it was.
        model, kv_precision, kv_tokens, prompt_tokens, metrics: as of `RequestOutput`; empty of a row that never ran.
        output_tokens, finish_reasons: of each sample.
        attempts: how often it was begun in this run.
    """

    seq: int
    id: RowId
    line: int
    file: int = 0
    error: str | None = None
    code: str | None = None
    model: str = ""
    kv_precision: str = ""
    kv_tokens: Mapping[str, int] = field(default_factory=dict)
    prompt_tokens: int = 0
    output_tokens: tuple[int, ...] = ()
    finish_reasons: tuple[str, ...] = ()
    metrics: RequestMetrics | None = None
    attempts: int = 1


class JobObserver:
    """Told of a job as it goes; override what is of interest. All calls come from the job's own thread.

    Attributes:
        error: what it has raised, since when it is told nothing more; None: nothing.
    """

    error: Exception | None = None

    def began(self, start: JobStart) -> None:
        """The engine is there, and the first row is about to be read."""

    def row(self, outcome: RowOutcome) -> None:
        """A row was answered, or an error was written of it."""

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        """The engine has made a step."""

    def note(self, text: str) -> None:
        """Something happened that people should know of."""

    def ended(self, summary: BatchSummary) -> None:
        """Nothing more is computed."""


class Observers(JobObserver):
    """Several observers as one. `take_rows`: whether any of them wants to know of single rows."""

    def __init__(self, observers: Iterable[JobObserver] = ()) -> None:
        self._observers = list(observers)
        self.take_rows = any(type(observer).row is not JobObserver.row for observer in self._observers)

    def began(self, start: JobStart) -> None:
        self._tell(lambda observer: observer.began(start))

    def row(self, outcome: RowOutcome) -> None:
        self._tell(lambda observer: observer.row(outcome))

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        self._tell(lambda observer: observer.step(summary, stats))

    def note(self, text: str) -> None:
        self._tell(lambda observer: observer.note(text))

    def ended(self, summary: BatchSummary) -> None:
        self._tell(lambda observer: observer.ended(summary))

    def _tell(self, tell: Callable[[JobObserver], None]) -> None:
        for observer in tuple(self._observers):
            try:
                tell(observer)
            except Exception as error:
                log.exception("%s failed and is told nothing more", type(observer).__name__)
                observer.error = error
                self._observers.remove(observer)
