"""Workloads in files: CSV with the columns of Azure's traces, or JSON lines that name each request's options."""

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from pydantic import ConfigDict, Field

from fineserve_jax.errors import ConfigError, FineServeError
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.sim.workload import Arrival, Kind, assign, deal, updated
from fineserve_jax.validation import Validated


def read_workload(path: Path, kinds: Sequence[Kind], seed: int) -> list[Arrival]:
    """The requests of a file, each of a kind; see `read_csv`, `read_jsonl` and `workload.assign`."""
    return assign(read_csv(path), kinds, seed) if path.suffix == ".csv" else read_jsonl(path, kinds, seed)


def read_csv(path: str | Path) -> list[Arrival]:
    """A trace with the columns of Azure's: TIMESTAMP, ContextTokens, GeneratedTokens.

    Raises:
        ConfigError: a file that cannot be read, lacks a column, or holds a value that is none.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error}") from None
    columns = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
    if not rows or any(rows[0].get(column) is None for column in columns):
        raise ConfigError(f"{path} must have rows with the columns {', '.join(columns)}")
    try:
        times = [_seconds(row["TIMESTAMP"]) for row in rows]
        lengths = [(max(1, int(row["ContextTokens"])), max(1, int(row["GeneratedTokens"]))) for row in rows]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds a value that cannot be read: {error}") from None
    start = min(times)
    arrivals = [Arrival(time - start, *pair) for time, pair in zip(times, lengths, strict=True)]
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def _seconds(stamp: str) -> float:
    """A timestamp, or plain seconds. Azure's have seven digits of a second; Python reads six."""
    try:
        return float(stamp)
    except ValueError:
        pass
    whole, _, fraction = stamp.partition(".")
    digits = fraction.rstrip("Z")
    return datetime.fromisoformat(whole + "+00:00").timestamp() + (float(f"0.{digits}") if digits else 0.0)


class WorkloadLine(Validated):
    """A line of a JSON-lines workload: the fields of an arrival; fields of `RequestOptions` stand beside them."""

    model_config = ConfigDict(extra="allow")

    arrival_s: float = Field(allow_inf_nan=False)
    prompt_tokens: int = Field(ge=1)
    output_tokens: int = Field(ge=1)
    prefix: int = 0
    prefix_tokens: int = Field(default=0, ge=0)

    def arrival(self, kind: Kind) -> Arrival:
        """The request. What the line says beats what its kind says; null and "" say nothing."""
        own = {name: value for name, value in (self.model_extra or {}).items() if value not in (None, "")}
        options = updated(kind.options, **own) if own else kind.options
        return Arrival(self.arrival_s, self.prompt_tokens, self.output_tokens, options, self.prefix, self.prefix_tokens)


def read_jsonl(path: str | Path, kinds: Sequence[Kind], seed: int) -> list[Arrival]:
    """One JSON object a line with the fields of `WorkloadLine` and `RequestOptions`, dealt out to kinds as by `assign`.

    Raises:
        ConfigError: a file that cannot be read, a line that is no such object, by its number, or kinds that `assign`
            would refuse.
    """
    try:
        texts = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the workload {path}: {error}") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        if text.strip():
            with _naming(path, number):
                lines.append((number, WorkloadLine(**json.loads(text))))
    lines.sort(key=lambda numbered: numbered[1].arrival_s)
    arrivals = []
    for (number, line), kind in zip(lines, deal(len(lines), kinds, seed), strict=True):
        with _naming(path, number):
            arrivals.append(line.arrival(kind))
    return arrivals


@contextmanager
def _naming(path: str | Path, number: int) -> Iterator[None]:
    """Errors within tell the line, and what it may have."""
    try:
        yield
    except (FineServeError, TypeError, ValueError) as error:
        known = ", ".join((*WorkloadLine.model_fields, *RequestOptions.model_fields))
        raise ConfigError(f"{path}, line {number}: {error}; a line may have {known}") from None
