"""Decoding of rows that begin alike, with the common tokens read once a step or by each row: in turn, in one engine.

    PYTHONPATH=. python benchmarks/shared_prefix.py --rows 32 --shared 1024

One JSON object is printed: milliseconds of a step with and without, medians, and how many times as fast it is.
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
    shared: int = 1024
    """Tokens that all rows begin with."""
    own: int = 32
    """Tokens of each row behind them."""
    rounds: int = 8
    steps: int = 6
    """Of a round, on each side."""
    clock: str = "wall"
    """wall, or cpu: seconds of all threads together, for machines with other work."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    engine = make_engine(arguments)
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]
    sides: dict[bool, list[float]] = {True: [], False: []}
    for number in range(2 * arguments.rounds):
        engine.runner.shares = shares = number % 2 == 0
        for _ in range(2):  # the first step was called before, the second may compile
            engine.step()
        start = clock()
        for _ in range(arguments.steps):
            engine.step()
        sides[shares].append((clock() - start) / arguments.steps)
    apart, together = (1e3 * statistics.median(sides[shares][1:]) for shares in (False, True))
    result = {
        "apart_ms": round(apart, 2),
        "together_ms": round(together, 2),
        "times_as_fast": round(apart / together, 2),
    }
    print(json.dumps({**dataclasses.asdict(arguments), "machine": processor_name(), **result}))


def make_engine(arguments: Arguments) -> Engine:
    """An engine whose requests all decode."""
    new_tokens = 2 * arguments.rounds * (arguments.steps + 2) + 4 * arguments.rows
    length = arguments.shared + arguments.own + new_tokens
    config = EngineConfig(kv_memory="1GiB", max_batch_size=arguments.rows, max_seq_len=length)
    rng = np.random.default_rng(0)
    common = rng.integers(1000, 20000, arguments.shared).tolist()
    prompts = [[*common, *rng.integers(1000, 20000, arguments.own).tolist()] for _ in range(arguments.rows)]
    kv_precisions = [arguments.kv_precision]
    return start_decoding(arguments.model, arguments.weights, config, prompts, kv_precisions, new_tokens)[0]


if __name__ == "__main__":
    main()
