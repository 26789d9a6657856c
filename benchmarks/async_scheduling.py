"""Decoding with steps that are called while others are computed, and one by one: in turn, in one engine.

    PYTHONPATH=. python benchmarks/async_scheduling.py --rows 32

One JSON object is printed: of both sides milliseconds of a step, and of the engine thread's processor time in it;
medians.
"""

import dataclasses
import json
import statistics
import time

import numpy as np
import tyro
from decoding import start_decoding

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.processor import processor_name


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    kv_precision: str = "bf16"
    rows: int = 32
    tokens: int = 128
    """Of each prompt."""
    rounds: int = 12
    steps: int = 10
    """Of a round, on each side."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    engine = make_engine(arguments)
    sides: dict[bool, list[tuple[float, ...]]] = {True: [], False: []}
    clocks = (time.perf_counter, time.thread_time, time.process_time)
    for number in range(2 * arguments.rounds):
        engine.pipeline.looks_ahead = ahead = number % 2 == 0
        engine.step()
        start = [clock() for clock in clocks]
        for _ in range(arguments.steps):
            engine.step()
        sides[ahead].append(tuple((clock() - s) / arguments.steps for clock, s in zip(clocks, start, strict=True)))
    result = {}
    for name, ahead in (("ahead", True), ("one_by_one", False)):
        columns = zip(*sides[ahead][1:], strict=True)
        step, host, all_threads = (round(1e3 * statistics.median(column), 2) for column in columns)
        fastest = round(1e3 * min(row[0] for row in sides[ahead][1:]), 2)
        result[name] = {"step_ms": step, "fastest_ms": fastest, "host_ms": host, "all_threads_ms": all_threads}
    print(json.dumps({**dataclasses.asdict(arguments), "machine": processor_name(), **result}))


def make_engine(arguments: Arguments) -> Engine:
    """An engine whose requests all decode."""
    new_tokens = 2 * arguments.rounds * (arguments.steps + 1) + 4 * arguments.rows
    config = EngineConfig(
        kv_memory="1GiB",
        max_batch_size=arguments.rows,
        max_seq_len=arguments.tokens + new_tokens,
        prefix_cache="off",
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1000, 20000, arguments.tokens).tolist() for _ in range(arguments.rows)]
    kv_precisions = [arguments.kv_precision]
    return start_decoding(arguments.model, arguments.weights, config, prompts, kv_precisions, new_tokens)[0]


if __name__ == "__main__":
    main()
