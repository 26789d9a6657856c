"""The gain of low-precision KV in short memory on a real engine, and what the simulator says of the same batch.

    python benchmarks/paper_engine.py

One model, requests in several KV precisions, and memory for only some of them at a time. Engines with the same model
and memory take turns step by step, each with a clock of its own that stands still meanwhile, so that it does them all
the same good or harm if the machine is faster for a while:

    fineserve    slabs of any length; fewer bits first, then less expected work, with ageing
    uniform      pages of one length for all formats, first come first served
    static       a fixed share of the memory for each format, first come first served

Each first serves a smaller batch, from which it learns how long steps take and answers are. With the profile that it
learnt, the simulator then serves the same two batches through the same scheduler and memory on a virtual clock, and
what it predicts of the second, total time and order of completion, stands beside what happened. So does what the
profile says of the very steps that were taken, which leaves only its own error, and how much faster or slower the
machine has become since. The last line is JSON.
"""

import copy
import dataclasses
import json
import math
import statistics
import time
from typing import Any

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from scipy.stats import kendalltau

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.request.request import SchedulerOutput
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.costs import step_cost
from fineserve_jax.sim.simulator import Simulator
from fineserve_jax.sim.workload import Arrival, Kind, assign, draw

SYSTEMS: dict[str, dict[str, Any]] = {
    "fineserve": {"policy": "fineserve", "slab_policy": "elastic"},
    "uniform": {"policy": "fcfs", "slab_policy": "uniform"},
    "static": {"policy": "fcfs", "slab_policy": "partitioned"},
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    requests: int = 200
    learning_requests: int = 60
    mix: tuple[str, ...] = ("bf16", "int8", "int4", "int4", "int4", "int4")
    """KV precisions, dealt out at random; one that is named twice gets twice the share."""
    shorten: float = 3.0
    """Lengths are those of chats (medians of 110 and 230 tokens) over this."""
    max_seq_len: int = 256
    kv_memory: str = "24MiB"
    max_batch_size: int = 64
    max_chunk_tokens: int = 256
    rounds: int = 1
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of one batch: seconds from its first step to its last token, and for each request when its last token came."""

    seconds: float
    finished_s: np.ndarray
    preemptions: int
    mean_running: float = math.nan
    steps_predicted_s: float = math.nan
    """What the profile of before the batch says of its steps."""


class OwnTime:
    """A clock, in seconds, that runs only within `with`."""

    def __init__(self) -> None:
        self._passed_s, self._since = 0.0, math.nan

    def __call__(self) -> float:
        return self._passed_s if math.isnan(self._since) else self._passed_s + time.perf_counter() - self._since

    def __enter__(self) -> None:
        self._since = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self._passed_s, self._since = self(), math.nan


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    learning, batch = (
        workload(arguments, model.name, count, arguments.seed + number)
        for number, count in enumerate((arguments.learning_requests, arguments.requests))
    )
    engines = {name: Engine(model, settings(arguments, name), clock=OwnTime()) for name in SYSTEMS}
    for engine in engines.values():
        engine.warm_up(sorted(set(arguments.mix)))
    serve(engines, learning, arguments.seed)
    compiled = sum(engine.stats().num_compilations for engine in engines.values())
    simulated = {name: simulate(arguments, model, engine, name, learning, batch) for name, engine in engines.items()}
    real: dict[str, list[Outcome]] = {name: [] for name in engines}
    for number in range(arguments.rounds):
        for name, outcome in serve(engines, batch, arguments.seed + 1 + number).items():
            real[name].append(outcome)
    compiled = sum(engine.stats().num_compilations for engine in engines.values()) - compiled
    report(arguments, compared(batch, real, simulated), compiled)


def settings(arguments: Arguments, system: str) -> EngineConfig:
    return EngineConfig(
        kv_memory=arguments.kv_memory,
        kv_formats=tuple(dict.fromkeys(arguments.mix)),
        max_batch_size=arguments.max_batch_size,
        max_seq_len=arguments.max_seq_len,
        max_chunk_tokens=arguments.max_chunk_tokens,
        prefix_cache="off",
        preemption="recompute",
        **SYSTEMS[system],
    )


def workload(arguments: Arguments, model: str, count: int, seed: int) -> list[Arrival]:
    """So many requests of chats' lengths, shortened, that are all there at the start."""
    drawn = draw(rate=2.0 * count, seconds=1.0, seed=seed)[:count]
    kinds = [Kind(1.0, RequestOptions(model=model, kv_precision=name)) for name in arguments.mix]
    most = arguments.max_seq_len // 2
    return [
        dataclasses.replace(
            arrival,
            arrival_s=0.0,
            prompt_tokens=min(most, max(1, round(arrival.prompt_tokens / arguments.shorten))),
            output_tokens=min(most, max(1, round(arrival.output_tokens / arguments.shorten))),
        )
        for arrival in assign(drawn, kinds, seed)
    ]


def serve(engines: dict[str, Engine], batch: list[Arrival], seed: int) -> dict[str, Outcome]:
    """Each engine serves a batch for real, prompts of random tokens; they take turns step by step."""
    servings = {name: Serving(engine, batch, seed) for name, engine in engines.items()}
    while left := [serving for serving in servings.values() if serving.engine.has_unfinished]:
        for serving in left:
            serving.step()
    return {name: serving.outcome() for name, serving in servings.items()}


class Serving:
    """An engine on its way through a batch."""

    def __init__(self, engine: Engine, batch: list[Arrival], seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.engine, self.running, self.predicted_s = engine, list[int](), 0.0
        self.preemptions, self.start_s = engine.scheduler.num_preemptions, engine.clock()
        (profile,) = engine.scheduler.profiles.values()
        self.profile, self.observe = copy.deepcopy(profile), engine.scheduler.observe
        engine.scheduler.observe = self.note
        self.requests = [
            engine.add_request(
                rng.integers(1000, 20000, arrival.prompt_tokens).tolist(),
                SamplingParams(max_tokens=arrival.output_tokens, ignore_eos=True),
                RequestOptions(kv_precision=arrival.kv_precision),
            )
            for arrival in batch
        ]

    def step(self) -> None:
        with self.engine.clock:  # type: ignore[attr-defined]
            self.engine.step()
        self.running.append(self.engine.scheduler.num_running)

    def note(self, output: SchedulerOutput, seconds: float) -> None:
        self.predicted_s += self.profile.predict(step_cost(output.chunks, self.profile.model.formats))
        self.observe(output, seconds)

    def outcome(self) -> Outcome:
        engine = self.engine
        del engine.scheduler.observe  # of the instance: the class has its own again
        finished = np.array([request.times.finished_s for request in self.requests], float) - self.start_s
        for request in self.requests:
            engine.release(request)
        return Outcome(
            engine.clock() - self.start_s,
            finished,
            engine.scheduler.num_preemptions - self.preemptions,
            statistics.mean(self.running),
            self.predicted_s,
        )


def simulate(
    arguments: Arguments,
    model: LoadedModel,
    engine: Engine,
    system: str,
    learning: list[Arrival],
    batch: list[Arrival],
) -> Outcome:
    """Serves both batches on a virtual clock, with a scheduler and memory like the engine's and its step profile."""
    timer = copy.deepcopy(engine.scheduler.profiles[model.name])
    twin = Engine(model, settings(arguments, system))  # for its scheduler and its KV manager; it computes nothing
    twin.scheduler.start_from({model.name: copy.deepcopy(timer)})
    for arrivals in (learning, batch):
        before = twin.scheduler.num_preemptions
        run = Simulator(twin.scheduler, twin.kv, {model.name: timer}, max_output_tokens=0, fast=False).run(arrivals)
    finished = np.array([record.finished_s for record in run.requests], float)
    return Outcome(run.end_s, finished, run.num_preemptions - before)


def compared(
    batch: list[Arrival], real: dict[str, list[Outcome]], simulated: dict[str, Outcome]
) -> dict[str, dict[str, float]]:
    """What each system took for the batch, beside what was simulated."""
    tokens = sum(arrival.output_tokens for arrival in batch)
    uniform = statistics.median(outcome.seconds for outcome in real["uniform"])
    results = {}
    for name, outcomes in real.items():
        seconds, predicted = statistics.median(outcome.seconds for outcome in outcomes), simulated[name]
        results[name] = {
            "seconds": round(seconds, 2),
            "simulated_seconds": round(predicted.seconds, 2),
            "error": round(predicted.seconds / seconds - 1, 4),
            "steps_predicted_error": round(outcomes[0].steps_predicted_s / outcomes[0].seconds - 1, 4),
            "order_kendall_tau": round(float(kendalltau(outcomes[0].finished_s, predicted.finished_s).statistic), 4),
            "tokens_per_s": round(tokens / seconds, 1),
            "times_uniform": round(uniform / seconds, 3),
            "simulated_times_uniform": round(simulated["uniform"].seconds / predicted.seconds, 3),
            "mean_running": round(outcomes[0].mean_running, 1),
            "preemptions": outcomes[0].preemptions,
            "simulated_preemptions": predicted.preemptions,
        }
    return results


# heading: (what it shows of `compared`, as what)
COLUMNS = {
    "s": ("seconds", ".1f"),
    "simulated s": ("simulated_seconds", ".1f"),
    "error": ("error", "+.1%"),
    "its steps": ("steps_predicted_error", "+.1%"),
    "order (Kendall)": ("order_kendall_tau", ".3f"),
    "tokens/s": ("tokens_per_s", ".0f"),
    "times uniform": ("times_uniform", ".2f"),
    "simulated": ("simulated_times_uniform", ".2f"),
    "running": ("mean_running", ".1f"),
}


def report(arguments: Arguments, results: dict[str, dict[str, float]], compilations: int) -> None:
    table = Table("", *COLUMNS)
    for name, result in results.items():
        table.add_row(name, *(format(result[key], spec) for key, spec in COLUMNS.values()))
    Console(width=140).print(table)
    told = {
        **dataclasses.asdict(arguments),
        "results": results,
        "compilations_after_warm_up": compilations,
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
