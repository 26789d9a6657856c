"""What a scheduling decision costs the host: both levels, with many requests running and very many waiting.

    python benchmarks/scheduler_cost.py [--running 256] [--waiting 1000 10000 100000]

A decision is one `Scheduler.schedule`; the `commit` of its outcome is timed beside it. Memory is full, so that rows
have to grow and a request that ends lets another in: each step one row, in turn, ends and one request arrives. Printed
are the median and the 99th percentile over the steps, and how the median grows with the queue.
"""

import dataclasses
import gc
import json
import time

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import FinishReason, Request, RequestStatus, RequestTimes
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler import Scheduler
from fineserve_jax.sim import DEVICES, SYSTEMS, Cluster, build, parse_model

FORMATS = ("bf16", "int8", "int4")
GREEDY = SamplingParams()


@dataclasses.dataclass(frozen=True)
class Arguments:
    running: int = 256
    waiting: tuple[int, ...] = (1000, 10_000, 100_000)
    steps: int = 1000
    policy: str = "fineserve"
    kv_bytes: float = 30e9
    prompt_tokens: int = 512
    prefix_cache: bool = True


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    table = Table("waiting", "running", "decision, median ms", "99th percentile", "commit, median ms", "chunks a step")
    results = {}
    for waiting in arguments.waiting:
        decisions, commits, running, chunks = measure(arguments, waiting)
        median, high = (1e3 * float(value) for value in np.percentile(decisions, [50, 99]))
        commit = 1e3 * float(np.median(commits))
        figures = {"median_ms": round(median, 3), "p99_ms": round(high, 3), "commit_ms": round(commit, 3)}
        results[waiting] = figures | {"running": running}
        table.add_row(f"{waiting:,}", str(running), *(f"{value:.3f}" for value in (median, high, commit, chunks)))
    Console().print(table)
    medians = [result["median_ms"] for result in results.values()]
    growth = {"queue": arguments.waiting[-1] / arguments.waiting[0], "median": round(medians[-1] / medians[0], 2)}
    print(json.dumps({**dataclasses.asdict(arguments), "results": results, "growth": growth}))


def measure(arguments: Arguments, waiting: int) -> tuple[list[float], list[float], int, float]:
    """Process seconds of each decision and of each commit, rows in the last step, and mean chunks of a step."""
    scheduler, kv = fill(arguments, waiting)
    decisions, commits, now, number, chunks = [], [], 1e3, 10**7, 0
    gc.collect()
    gc.freeze()  # as a server would, once its queue stands; collections of what steps leave behind still count
    for step in range(arguments.steps):
        start = time.process_time()
        output = scheduler.schedule(now)
        scheduled = time.process_time()
        assert output is not None
        now += 0.02
        advanced = scheduler.commit(output, [7] * len(output.chunks), now)
        commits.append(time.process_time() - scheduled)
        decisions.append(scheduled - start)
        kv.take_operations()
        chunks += len(output.prefills)
        if advanced:
            scheduler.finish(advanced[step % len(advanced)], FinishReason.LENGTH, now)
        number += 1
        scheduler.add(request(number, arguments, now))
    return decisions, commits, scheduler.num_running, chunks / arguments.steps


def fill(arguments: Arguments, waiting: int) -> tuple[Scheduler, KVManager]:
    """A scheduler with its batch full and a queue behind it."""
    model = parse_model("llama-3.1-8b")
    cluster = Cluster(
        DEVICES["h100"],
        (model,),
        {model.name: FORMATS},
        arguments.kv_bytes,
        prefix_cache="exact" if arguments.prefix_cache else "off",
    )
    settings = {"max_batch_size": arguments.running, "max_chunk_tokens": 2048, "policy": arguments.policy}
    scheduler, kv, _ = build(SYSTEMS["fineserve"], cluster, **settings)
    now = 0.0
    for number in range(arguments.running + waiting):
        scheduler.add(request(number, arguments, number * 1e-4))
    while (
        any(r.status is not RequestStatus.FINISHED and r.num_output_tokens == 0 for r in kv.requests) or not kv.requests
    ):
        output = scheduler.schedule(now)
        assert output is not None
        now += 0.02
        scheduler.commit(output, [7] * len(output.chunks), now)
        kv.take_operations()
    return scheduler, kv


def request(number: int, arguments: Arguments, now: float) -> Request:
    length = arguments.prompt_tokens // 2 + number * 7919 % arguments.prompt_tokens
    return Request(
        request_id=str(number),
        model="llama-3.1-8b@bf16",
        kv_precision=FORMATS[number % len(FORMATS)],
        sampling=GREEDY,
        token_ids=[number] * length,
        num_prompt_tokens=length,
        max_total_tokens=length + 4096,
        sequence=number,
        times=RequestTimes(now),
        options=RequestOptions(ttft_slo_s=1e4 + number % 7, tpot_slo_s=0.1, tenant=f"tenant {number % 5}"),
    )


if __name__ == "__main__":
    main()
