"""A job as its observers see it, without an engine."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from fineserve_jax import RequestMetrics
from fineserve_jax.entrypoints.batch.observers import JobObserver, JobStart, RowOutcome
from fineserve_jax.entrypoints.batch.summary import BatchSummary

FORMATS = ("bf16", "int8", "int4")
HOSTILE = '<script>alert(1)</script> & "quoted"'


@dataclass
class Clock:
    """Seconds that pass when they are told to."""

    now_s: float = 100.0
    latencies: list[float] = field(default_factory=list)

    def __call__(self) -> float:
        return self.now_s


def stats_after(tokens: int, running: int = 8) -> Any:
    """What of `EngineStats` observers look at."""
    usage = {
        name: SimpleNamespace(needed_bytes=1000 * (i + 1), reserved_bytes=2000 * (i + 1), cached_bytes=10, free_bytes=5)
        for i, name in enumerate(FORMATS)
    }
    counts = SimpleNamespace(asked_tokens=3 * tokens, hit_tokens=tokens, narrowed_pages=2, evicted_pages=1)
    return SimpleNamespace(
        kv=usage,
        kv_bytes=100_000,
        kv_counts=counts,
        num_running=running,
        num_waiting=3,
        num_output_tokens=tokens,
        num_prompt_tokens=2 * tokens,
        num_preemptions=4,
        num_compilations=5,
        num_steps=tokens,
    )


def outcome(seq: int, total_s: float = 2.0, **fields: Any) -> RowOutcome:
    metrics = RequestMetrics(queue_s=total_s / 10, ttft_s=total_s / 4, total_s=total_s, num_preemptions=0)
    known = {
        "model": "tiny",
        "kv_precision": FORMATS[seq % 3],
        "kv_tokens": {FORMATS[seq % 3]: 50},
        "prompt_tokens": 40 + seq % 7,
        "output_tokens": (10 + seq % 5,),
        "finish_reasons": ("stop" if seq % 4 else "length",),
        "metrics": metrics,
    }
    return RowOutcome(seq, f"row-{seq}", seq + 1, **{**known, **fields})


def failed(seq: int, code: str = "invalid_request", error: str = "temperature=-1: too cold") -> RowOutcome:
    return RowOutcome(seq, f"row-{seq}", seq + 1, 0, error, code)


def play(observer: JobObserver, clock: Clock, num_rows: int = 200, *, ends: bool = True) -> BatchSummary:
    """A job of some rows, every ninth of which fails."""
    summary = BatchSummary(seconds=num_rows / 4, decode_tokens=900, decode_s=30.0, hit_tokens=300)
    options = {"engine.seed": 0, "sampling.temperature": 0.7, HOSTILE: HOSTILE, "nothing": None}
    observer.began(JobStart(num_rows, ("prompts.jsonl", HOSTILE), "answers.jsonl", options))
    rng, tokens = np.random.default_rng(0), 0
    for seq in range(num_rows):
        clock.now_s += 0.25
        if seq % 9 == 8:
            bad = failed(seq, *(("engine_fault", HOSTILE) if seq % 2 else ()))
            summary.errors += 1
            observer.row(bad)
        else:
            total_s = float(rng.lognormal(0.5, 0.6))
            clock.latencies.append(total_s)
            done = outcome(seq, total_s)
            tokens += sum(done.output_tokens)
            summary.note_row(done.kv_precision, done.prompt_tokens, sum(done.output_tokens))
            part = summary.formats[done.kv_precision]
            part.peak_needed_bytes, part.peak_reserved_bytes = 3 << 20, 4 << 20
            observer.row(done)
        summary.sampled_tokens = tokens
        observer.step(summary, stats_after(tokens))
    observer.note("the engine has failed with 3 rows; they are tried again")
    if ends:
        observer.ended(summary)
    return summary
