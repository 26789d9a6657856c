"""What a run amounts to: rates, latencies, how many requests were in time, and how full the memory was."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fineserve_jax.sim.records import Run

PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Latency:
    """Percentiles in seconds; None without a value."""

    p50: float | None
    p90: float | None
    p99: float | None


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one run.

    Attributes:
        num_requests, num_done, num_dropped, num_refused: arrivals, and what became of them.
        seconds: from the first arrival to the end.
        output_tokens_per_s: tokens of answered requests over `seconds`.
        goodput_tokens_per_s: the same of requests that were in time.
        goodput_per_s: requests in time over `seconds`.
        attainment: share of all arrivals that were answered within their targets.
        ttft, tpot, end_to_end: of answered requests.
        attainment_by_format: `attainment` of each KV format.
        end_to_end_p99_by_format: seconds, of each KV format.
        reserved_over_needed: bytes reserved over bytes needed, each summed over the samples.
        occupancy: bytes needed over the usable, mean over the samples.
        mean_running: requests that held memory, mean over the samples.
        num_preemptions, num_steps: counts.
        longest_wait_s: longest time from an arrival to its first admission.
        prediction_error: the scheduler's typical error about a step, the worst of its models.
    """

    num_requests: int
    num_done: int
    num_dropped: int
    num_refused: int
    seconds: float
    output_tokens_per_s: float
    goodput_tokens_per_s: float
    goodput_per_s: float
    attainment: float
    ttft: Latency
    tpot: Latency
    end_to_end: Latency
    attainment_by_format: dict[str, float]
    end_to_end_p99_by_format: dict[str, float | None]
    reserved_over_needed: float | None
    occupancy: float
    mean_running: float
    num_preemptions: int
    num_steps: int
    longest_wait_s: float
    prediction_error: float | None

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def summarize(run: Run) -> Summary:
    """The figures of a run."""
    requests = run.requests
    done = [one for one in requests if one.outcome == "length"]
    start = min((one.arrival.arrival_s for one in requests), default=0.0)
    seconds = max(run.end_s - start, 1e-9)
    in_time = [one for one in done if one.in_time]
    formats = sorted({one.arrival.kv_precision for one in requests})
    by_format = {name: [one for one in requests if one.arrival.kv_precision == name] for name in formats}
    needed = sum(sample.needed_bytes for sample in run.samples)
    errors = [error for error in run.prediction_error.values() if error is not None]
    return Summary(
        num_requests=len(requests),
        num_done=len(done),
        num_dropped=sum(one.outcome == "late" for one in requests),
        num_refused=sum(one.outcome == "refused" for one in requests),
        seconds=seconds,
        output_tokens_per_s=sum(one.arrival.output_tokens for one in done) / seconds,
        goodput_tokens_per_s=sum(one.arrival.output_tokens for one in in_time) / seconds,
        goodput_per_s=len(in_time) / seconds,
        attainment=len(in_time) / max(1, len(requests)),
        ttft=_latency(one.ttft_s for one in done),
        tpot=_latency(one.tpot_s for one in done if one.arrival.output_tokens > 1),
        end_to_end=_latency(one.end_to_end_s for one in done),
        attainment_by_format={name: sum(one.in_time for one in ones) / len(ones) for name, ones in by_format.items()},
        end_to_end_p99_by_format={
            name: _latency(one.end_to_end_s for one in ones).p99 for name, ones in by_format.items()
        },
        reserved_over_needed=sum(s.reserved_bytes for s in run.samples) / needed if needed else None,
        occupancy=_mean([s.needed_bytes / run.usable_bytes for s in run.samples]),
        mean_running=_mean([s.num_running for s in run.samples]),
        num_preemptions=run.num_preemptions,
        num_steps=run.num_steps,
        longest_wait_s=max(
            (one.admitted_s - one.arrival.arrival_s for one in requests if one.admitted_s is not None), default=0.0
        ),
        prediction_error=max(errors, default=None),
    )


def _latency(values: Iterable[float | None]) -> Latency:
    known = [value for value in values if value is not None]
    if not known:
        return Latency(None, None, None)
    return Latency(*(float(value) for value in np.percentile(known, PERCENTILES)))


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else 0.0
