"""Workloads: who asks what, and when. Read from a trace or drawn; the same seed gives the same bytes."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from fineserve_jax.errors import ConfigError

# Lengths of chats, log-normal: medians near those of the ShareGPT conversations that serving papers sample
# (arXiv 2309.06180 gives means of 161 and 338 tokens).
CHAT_LENGTHS = ((math.log(110.0), 0.9), (math.log(230.0), 0.9))


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request that will come.

    Attributes:
        arrival_s: seconds from the start.
        prompt_tokens, output_tokens: lengths; nobody but the simulator knows the second before it is reached.
        model: name of the served model.
        kv_precision: its KV format.
        tenant: whose it is.
        ttft_slo_s, tpot_slo_s: targets; None: none.
        drop_when_late: whether it wants to be dropped when its first token cannot come in time any more.
        prefix, prefix_tokens: requests with the same `prefix` have their first `prefix_tokens` tokens in common.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    model: str = ""
    kv_precision: str = ""
    tenant: str = ""
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    drop_when_late: bool = False
    prefix: int = 0
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Kind:
    """A share of the requests, and what they have in common."""

    share: float
    model: str
    kv_precision: str
    ttft_slo_s: float | None = None
    tpot_slo_s: float | None = None
    tenant: str = ""


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


def read_jsonl(path: str | Path) -> list[Arrival]:
    """One JSON object a line with the fields of `Arrival`; those with a default may be left out.

    Raises:
        ConfigError: a file that cannot be read, or a line that is no such object, by its number.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the workload {path}: {error}") from None
    arrivals = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            arrivals.append(Arrival(**json.loads(line)))
        except (TypeError, ValueError) as error:
            known = ", ".join(field.name for field in dataclasses.fields(Arrival))
            raise ConfigError(f"{path}, line {number}: {error}; a line may have {known}") from None
    return sorted(arrivals, key=lambda arrival: arrival.arrival_s)


def draw(
    rate: float,
    seconds: float,
    seed: int,
    *,
    burstiness: float = 1.0,
    lengths: Sequence[Arrival] | None = None,
) -> list[Arrival]:
    """Arrivals at random: gaps are Gamma distributed, with lengths of chats or of a trace.

    Args:
        rate: mean requests a second.
        seconds: how long they keep coming.
        seed: the same seed draws the same arrivals.
        burstiness: coefficient of variation of the gaps; 1 is Poisson, more is burstier.
        lengths: requests to draw pairs of lengths from; None draws those of `CHAT_LENGTHS`.

    Raises:
        ConfigError: a rate, duration or burstiness that is not positive.
    """
    for name, value in (("rate", rate), ("seconds", seconds), ("burstiness", burstiness)):
        if not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{name}={value!r} of a drawn workload; give a positive number")
    rng = np.random.default_rng([seed, 1])
    shape = burstiness**-2
    expected = int(rate * seconds + 10 * burstiness * math.sqrt(rate * seconds) + 10)
    times: list[float] = []
    while not times or times[-1] < seconds:
        gaps = rng.gamma(shape, 1 / (shape * rate), expected)
        times += (np.cumsum(gaps) + (times[-1] if times else 0.0)).tolist()
    times = [time for time in times if time < seconds]
    pairs = _lengths(np.random.default_rng([seed, 2]), len(times), lengths)
    return [Arrival(time, *pair) for time, pair in zip(times, pairs, strict=True)]


def _lengths(rng: np.random.Generator, count: int, given: Sequence[Arrival] | None) -> list[tuple[int, int]]:
    if given is not None:
        picks = rng.integers(len(given), size=count).tolist()
        return [(given[i].prompt_tokens, given[i].output_tokens) for i in picks]
    prompts, outputs = (rng.lognormal(*of, size=count) for of in CHAT_LENGTHS)
    clipped = (np.clip(np.rint(values), 4, 2048).astype(int).tolist() for values in (prompts, outputs))
    return list(zip(*clipped, strict=True))


def assign(arrivals: Iterable[Arrival], kinds: Sequence[Kind], seed: int) -> list[Arrival]:
    """Deal arrivals out to kinds at random, in proportion to their shares.

    What an arrival says of itself (a JSONL may name the model of each line) is kept.

    Raises:
        ConfigError: no kinds, or a share that is not positive.
    """
    if not kinds or not all(kind.share > 0 and math.isfinite(kind.share) for kind in kinds):
        raise ConfigError(f"a mix of {[kind.share for kind in kinds]}: give at least one kind, each a positive share")
    listed = list(arrivals)
    shares = np.array([kind.share for kind in kinds])
    picks = np.random.default_rng([seed, 3]).choice(len(kinds), size=len(listed), p=shares / shares.sum())
    return [_of_kind(arrival, kinds[pick]) for arrival, pick in zip(listed, picks.tolist(), strict=True)]


def _of_kind(arrival: Arrival, kind: Kind) -> Arrival:
    given: dict[str, Any] = {}
    for name in ("model", "kv_precision", "tenant", "ttft_slo_s", "tpot_slo_s"):
        if getattr(arrival, name) in ("", None):
            given[name] = getattr(kind, name)
    return dataclasses.replace(arrival, **given)


def scale_rate(arrivals: Iterable[Arrival], factor: float) -> list[Arrival]:
    """The same requests, `factor` times as fast; raises ConfigError for a factor that is not positive."""
    if not (factor > 0 and math.isfinite(factor)):
        raise ConfigError(f"rate scale {factor!r}; give a positive number")
    return [dataclasses.replace(arrival, arrival_s=arrival.arrival_s / factor) for arrival in arrivals]
