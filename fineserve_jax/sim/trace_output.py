"""A run as a trace that Perfetto (ui.perfetto.dev) and Chrome (chrome://tracing) open: JSON of trace events.

Rows: the device's steps by model, each request from arrival to end with its waiting, prefill and decoding, and
counters of memory by format and of requests waiting and running. Times are microseconds, as the format wants.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fineserve_jax.sim.records import RequestRecord, Run

DEVICE, REQUESTS, COUNTERS = 1, 2, 3
LANES = 200
"""Requests are spread over so many rows; one row each would be too many to look at."""

Event = dict[str, Any]


def write_trace(path: str | Path, run: Run, name: str) -> None:
    """Write a run, whose steps were recorded, to a file."""
    events = [*_names(name), *_steps(run), *_requests(run), *_counters(run)]
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}, separators=(",", ":")) + "\n")


def _names(name: str) -> Iterator[Event]:
    for process, title in ((DEVICE, "device"), (REQUESTS, "requests"), (COUNTERS, "memory and queues")):
        yield {"ph": "M", "pid": process, "name": "process_name", "args": {"name": f"{name}: {title}"}}


def _steps(run: Run) -> Iterator[Event]:
    models = {model: i for i, model in enumerate(dict.fromkeys(step.model for step in run.steps))}
    for model, thread in models.items():
        yield {"ph": "M", "pid": DEVICE, "tid": thread, "name": "thread_name", "args": {"name": model}}
    for step in run.steps:
        title = f"{step.num_decodes} rows" + (f" + {len(step.chunks)} chunks" if step.chunks else "")
        chunks = [f"{request}: {start} to {start + count}" for request, start, count in step.chunks]
        details = {"decode rows": step.num_decodes, "steps": step.count, "chunks": chunks}
        yield _span(DEVICE, models[step.model], title, step.start_s, step.end_s, details)


def _requests(run: Run) -> Iterator[Event]:
    for number, record in enumerate(run.requests):
        lane, arrival = number % LANES, record.arrival
        details = {
            "model": arrival.model,
            "kv_precision": arrival.kv_precision,
            "prompt tokens": arrival.prompt_tokens,
            "output tokens": arrival.output_tokens,
            "outcome": record.outcome,
            "preemptions": record.num_preemptions,
        }
        for title, start, end in _phases(record, run.end_s):
            yield _span(REQUESTS, lane, f"{number} {title}", start, end, details)
        if record.admitted_s is not None:
            yield _instant(lane, f"{number} admitted", record.admitted_s)
        if record.num_preemptions:
            yield _instant(lane, f"{number} preempted {record.num_preemptions} times", record.finished_s or run.end_s)


def _phases(record: RequestRecord, end_s: float) -> Iterator[tuple[str, float, float]]:
    marks = (record.arrival.arrival_s, record.admitted_s, record.first_token_s, record.finished_s)
    for title, start, end in zip(("waits", "prefill", "decode"), marks, marks[1:], strict=False):
        if start is None:
            return
        yield title, start, record.finished_s or end_s if end is None else end


def _counters(run: Run) -> Iterator[Event]:
    for sample in run.samples:
        memory = {name: size / 1e9 for name, size in sample.reserved_by_format.items()}
        queues = {"waiting": sample.num_waiting, "running": sample.num_running}
        for title, values in (("KV memory reserved, GB", memory), ("requests", queues)):
            yield {"ph": "C", "pid": COUNTERS, "name": title, "ts": _us(sample.time_s), "args": values}


def _span(process: int, thread: int, title: str, start_s: float, end_s: float, details: Event) -> Event:
    span = {"ph": "X", "pid": process, "tid": thread, "name": title, "args": details}
    return span | {"ts": _us(start_s), "dur": _us(end_s - start_s)}


def _instant(lane: int, title: str, time_s: float) -> Event:
    return {"ph": "i", "pid": REQUESTS, "tid": lane, "name": title, "ts": _us(time_s), "s": "t"}


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 3)
