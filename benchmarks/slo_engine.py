"""How many requests a real server answers within their targets as more and more come, and what is simulated of it.

    python benchmarks/slo_engine.py                      # minutes; wants a machine that does nothing else
    python benchmarks/slo_engine.py --trace azure.csv --seconds 3600      # an hour for each system at each rate

Requests in several KV precisions come open-loop over HTTP, at rates that are shares of what the server can do. Each
system has the same model and memory, which is short:

    fineserve    slabs of any length; fewer bits first, then less expected work, with ageing; steps by targets
    uniform      pages of one length for all formats, first come first served
    static       a fixed share of the memory for each format, first come first served

A request is in time if its first token comes within `ttft_slo_s` of when it was due, and the others at `tpot_slo_s`
each or faster, by the client's clock; what is refused or late is not. Targets are multiples of what a request takes
that is alone, measured first. Beside each share stands that of the simulator, which serves the same arrivals through
the same scheduler and memory with the step profile that the engine had learnt before. The last line is JSON.
"""

import asyncio
import copy
import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from open_loop import Answer, ask, serving
from paper_engine import SYSTEMS
from rich.console import Console
from rich.table import Table

from fineserve_jax import AsyncLLM
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.scheduler import StepProfile
from fineserve_jax.sim.metrics import summarize
from fineserve_jax.sim.simulator import Simulator
from fineserve_jax.sim.traces import read_csv
from fineserve_jax.sim.workload import Arrival, Kind, assign, draw


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    mix: tuple[str, ...] = ("bf16", "int8", "int4", "int4")
    """KV precisions, dealt out at random; one that is named twice gets twice the share."""
    systems: tuple[str, ...] = ("fineserve", "uniform", "static")
    loads: tuple[float, ...] = (0.3, 0.5, 0.7, 0.9, 1.1)
    """Rates, as shares of the requests a second that `fineserve` answers when all are there at once."""
    seconds: float = 60.0
    """How long requests come at each rate."""
    trace: Path | None = None
    """Arrivals and lengths of a trace instead, in the columns of Azure's: its whole course in `seconds`, of as many
    of its requests as the rates want."""
    shorten: float = 3.0
    """Lengths are those of chats (medians of 110 and 230 tokens), or of the trace, over this."""
    ttft_slo: float = 5.0
    """Of what the first token of a request that is alone takes."""
    tpot_slo: float = 3.0
    """Of what each further token of a request that is alone takes."""
    learning_requests: int = 40
    max_seq_len: int = 256
    kv_memory: str = "16MiB"
    max_batch_size: int = 32
    max_chunk_tokens: int = 128
    seed: int = 0


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    rng = np.random.default_rng(arguments.seed)
    results: list[dict[str, Any]] = []
    rate, targets = 0.0, (0.0, 0.0)
    for name in arguments.systems:
        llm = make_llm(arguments, name)
        with serving(llm, max_wait_s=3600, max_waiting=10**6) as port:
            asyncio.run(llm.warm_up(arguments.mix))  # else the first requests wait for programs, and rates are too low
            learning = workload(arguments, 1.0, arguments.learning_requests, seed=arguments.seed)
            learning = [dataclasses.replace(arrival, arrival_s=0.0) for arrival in learning]
            burst = asyncio.run(replay(port, llm, learning, rng))
            if not rate:  # of the first system, for all
                rate = len(burst) / max(answer.total_s for answer in burst)
                targets = targets_of(arguments, port, llm, rng)
            for load in arguments.loads:
                arrivals = workload(arguments, load * rate, None, seed=arguments.seed + 1, targets=targets)
                simulated = simulate(llm.engine, learning, arrivals)
                answers = asyncio.run(replay(port, llm, arrivals, rng))
                results.append({"system": name, "load": load, **figures(arrivals, answers), "simulated": simulated})
                print(json.dumps(results[-1]), flush=True)
        asyncio.run(llm.close())
    report(arguments, rate, targets, results)


def make_llm(arguments: Arguments, system: str) -> AsyncLLM:
    return AsyncLLM(
        arguments.model, weights=arguments.weights, kv_precision=arguments.mix[0], **sizes(arguments, system)
    )


def sizes(arguments: Arguments, system: str) -> dict[str, Any]:
    return {
        "kv_memory": arguments.kv_memory,
        "kv_formats": tuple(dict.fromkeys(arguments.mix)),
        "max_batch_size": arguments.max_batch_size,
        "max_seq_len": arguments.max_seq_len,
        "max_chunk_tokens": arguments.max_chunk_tokens,
        "prefix_cache": "off",
        "preemption": "recompute",
        **SYSTEMS[system],
    }


def workload(
    arguments: Arguments, rate: float, count: int | None, seed: int, targets: tuple[float, float] | None = None
) -> list[Arrival]:
    """Requests at a rate, for as long as the arguments say or so many of them, with these targets."""
    seconds = arguments.seconds if count is None else 2.0 * count / rate + 10
    if arguments.trace is None:
        drawn = draw(rate, seconds, seed)
    else:
        drawn = shaped_as(read_csv(arguments.trace), rate, seconds, seed)
    ttft, tpot = targets or (None, None)
    options = {"ttft_slo_s": ttft, "tpot_slo_s": tpot}
    kinds = [Kind(1.0, RequestOptions(model=arguments.model, kv_precision=name, **options)) for name in arguments.mix]
    most = arguments.max_seq_len // 2
    shortened = [
        dataclasses.replace(
            arrival,
            prompt_tokens=min(most, max(2, round(arrival.prompt_tokens / arguments.shorten))),
            output_tokens=min(most, max(2, round(arrival.output_tokens / arguments.shorten))),
        )
        for arrival in drawn[:count]
    ]
    return assign(shortened, kinds, seed)


def shaped_as(trace: list[Arrival], rate: float, seconds: float, seed: int) -> list[Arrival]:
    """Requests of a trace at a mean rate: as many as that takes, drawn from all of its course, which is brought to the
    seconds. Rises, falls and bursts stay where they are in it."""
    wanted, span = round(rate * seconds), trace[-1].arrival_s
    if wanted > len(trace):
        raise SystemExit(f"{rate:.3g} requests a second for {seconds:g} s are {wanted}, and the trace has {len(trace)}")
    kept = np.sort(np.random.default_rng(seed).choice(len(trace), wanted, replace=False))
    return [dataclasses.replace(trace[i], arrival_s=trace[i].arrival_s * seconds / span) for i in kept]


async def replay(port: int, llm: AsyncLLM, arrivals: list[Arrival], rng: np.random.Generator) -> list[Answer]:
    """Asks for all arrivals when they are due."""
    start_s = asyncio.get_running_loop().time() + 0.5
    vocabulary = llm.engine.model.config.vocab_size
    return await asyncio.gather(
        *(
            ask(port, body_of(arrival, llm.engine.model.name, vocabulary, rng), start_s + arrival.arrival_s)
            for arrival in arrivals
        )
    )


def body_of(arrival: Arrival, model: str, vocabulary: int, rng: np.random.Generator) -> dict[str, Any]:
    """A prompt of random tokens, whose answer is as long as the arrival says."""
    options = {
        name: value for name, value in arrival.options.model_dump(exclude_unset=True).items() if value is not None
    }
    tokens = rng.integers(vocabulary // 2, vocabulary, arrival.prompt_tokens).tolist()
    length = {"max_tokens": arrival.output_tokens, "ignore_eos": True, "temperature": 0.0}
    return {**options, "model": model, "prompt": tokens, **length}


def targets_of(arguments: Arguments, port: int, llm: AsyncLLM, rng: np.random.Generator) -> tuple[float, float]:
    """Seconds to the first token, and for each further one, that requests are to have."""
    alone = [
        asyncio.run(replay(port, llm, [dataclasses.replace(arrival, arrival_s=0.0)], rng))[0]
        for arrival in workload(arguments, 1.0, 8, seed=arguments.seed + 2)
    ]
    ttft, tpot = (
        statistics.median(values) for values in zip(*((one.ttft_s, one.tpot_s) for one in alone), strict=True)
    )
    return arguments.ttft_slo * ttft, arguments.tpot_slo * tpot


def simulate(engine: Engine, learning: list[Arrival], arrivals: list[Arrival]) -> float:
    """The attainment on a virtual clock, with a scheduler and memory like the engine's and its step profile; how long
    answers are it learns from what the engine learnt it from."""
    (name,) = engine.models
    timer: StepProfile = copy.deepcopy(engine.scheduler.profiles[name])
    twin = Engine(engine.model, engine.config)  # for its scheduler and its KV manager; it computes nothing
    twin.scheduler.start_from({name: copy.deepcopy(timer)})
    for listed in (learning, arrivals):
        named = [dataclasses.replace(a, options=a.options.model_copy(update={"model": name})) for a in listed]
        run = Simulator(twin.scheduler, twin.kv, {name: timer}, max_output_tokens=0).run(named)
    return summarize(run).attainment


def figures(arrivals: list[Arrival], answers: list[Answer]) -> dict[str, Any]:
    pairs = list(zip(arrivals, answers, strict=True))
    done = [answer for answer in answers if answer.outcome == "done"]
    in_time = [answer for arrival, answer in pairs if is_in_time(arrival, answer)]
    span = max((arrival.arrival_s + answer.total_s for arrival, answer in pairs), default=0.0)
    return {
        "requests": len(answers),
        "lost": sum(answer.outcome == "lost" for answer in answers),
        "attainment": len(in_time) / max(1, len(answers)),
        "goodput_tokens_per_s": sum(answer.tokens for answer in in_time) / max(span, 1e-9),
        "ttft_p50_s": float(np.percentile([one.ttft_s for one in done], 50)) if done else None,
        "ttft_p99_s": float(np.percentile([one.ttft_s for one in done], 99)) if done else None,
        "tpot_p99_s": float(np.percentile([one.tpot_s for one in done], 99)) if done else None,
    }


def is_in_time(arrival: Arrival, answer: Answer) -> bool:
    options = arrival.options
    if answer.outcome != "done":
        return False
    ttft_is_met = options.ttft_slo_s is None or answer.ttft_s <= options.ttft_slo_s
    return ttft_is_met and (options.tpot_slo_s is None or answer.tpot_s <= options.tpot_slo_s)


def report(arguments: Arguments, rate: float, targets: tuple[float, float], results: list[dict[str, Any]]) -> None:
    table = Table(
        "load", *(f"{name}{what}" for name in arguments.systems for what in ("", " simulated")), "over uniform"
    )
    shares = {(one["system"], one["load"]): one for one in results}
    for load in arguments.loads:
        own = [shares[name, load] for name in arguments.systems]
        cells = [f"{one[key]:.1%}" for one in own for key in ("attainment", "simulated")]
        base = shares.get(("uniform", load), {"attainment": 0.0})["attainment"]
        table.add_row(f"{load:g}", *cells, f"{own[0]['attainment'] / base:.2f}" if base else "")
    Console(width=140).print(table)
    told = {"rate_per_s": rate, "ttft_slo_s": targets[0], "tpot_slo_s": targets[1], "results": results}
    named = dataclasses.asdict(arguments) | {"trace": None if arguments.trace is None else str(arguments.trace)}
    print(json.dumps(named | told | outcome(arguments, results) | {"processor": processor_name()}))


def outcome(arguments: Arguments, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What it comes to: where the first system's attainment is the largest multiple of that of uniform blocks, and how
    far simulations are from what was measured, in points of attainment."""
    reached = {(one["system"], one["load"]): one["attainment"] for one in results}
    own = arguments.systems[0]
    gains = {
        load: reached[own, load] / reached["uniform", load]
        for load in arguments.loads
        if reached.get(("uniform", load))
    }
    best = max(gains, key=lambda load: gains[load], default=None)
    errors = [100 * abs(one["simulated"] - one["attainment"]) for one in results]
    return {
        "lost": sum(one["lost"] for one in results),
        "largest_gain_over_uniform": None if best is None else gains[best],
        "at_load": best,
        "worst_simulation_error_points": max(errors),
        "mean_simulation_error_points": statistics.mean(errors),
    }


if __name__ == "__main__":
    main()
