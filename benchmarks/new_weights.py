"""How long `LLM.update_params` takes, by where the weights come from.

    python benchmarks/new_weights.py

Sources are a tree of the served dtypes, one of float32 as a trainer has it, the same as NumPy's arrays, and what names
the model. Printed are medians over the rounds, seconds of the wall and of the processor, and JSON. The model is
compiled and serves before, so that the time is that of an update between two steps.
"""

import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax import LLM, SamplingParams, load_model


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    rounds: int = 5


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    llm = LLM(arguments.model, weights=arguments.weights, kv_memory="64MiB", max_seq_len=128)
    llm.generate("The sky is", SamplingParams(max_tokens=2))
    wide = load_model(arguments.model, "fp32").params
    makers: dict[str, Callable[[], Any]] = {
        "as served": lambda: jax.tree.map(jnp.copy, llm.engine.model.params),
        "float32": lambda: wide,
        "float32, NumPy": lambda: jax.tree.map(np.asarray, wide),
        "name": lambda: arguments.model,
    }
    found = {name: medians(llm, make(), arguments.rounds) for name, make in makers.items()}
    table = Table("source", "seconds", "processor seconds")
    for name, pair in found.items():
        table.add_row(name, *(f"{value:.3f}" for value in pair))
    Console().print(table)
    print(json.dumps({**dataclasses.asdict(arguments), **found, "device": jax.devices()[0].device_kind}))


def medians(llm: LLM, source: Any, rounds: int) -> tuple[float, float]:
    """Seconds, and processor seconds, of an update; the first is not counted."""
    pairs = [timed(lambda: llm.update_params(source)) for _ in range(rounds + 1)][1:]
    wall, processor = (statistics.median(column) for column in zip(*pairs, strict=True))
    return wall, processor


def timed(run: Callable[[], object]) -> tuple[float, float]:
    wall, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - processor


if __name__ == "__main__":
    main()
