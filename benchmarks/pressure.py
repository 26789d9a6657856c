"""More requests than memory holds: narrowing older tokens against computing again or swapping.

    python benchmarks/pressure.py --load 1.5

Requests want `--load` times the KV memory at their greatest lengths. A third of them are in bf16 throughout; the
others would be too, but may be narrowed down to int4. Engines that differ only in what they do when memory is short
take turns:

    narrow       older tokens of those that allow it go to int8, then int4
    recompute    nothing is narrowed; preempted requests are computed again
    swap         nothing is narrowed; preempted requests' pages go to host memory and back
    roomy        for comparison: memory enough for all

Printed are the median times to finish the batch, whether the bf16 requests' tokens equal those of the roomy engine, and
a line of JSON. What narrowing costs in quality is told by `fineserve-jax quality --pressure`.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    requests: int = 24
    prompt_tokens: int = 256
    new_tokens: int = 256
    load: float = 1.5
    rounds: int = 3
    plot: Path | None = None
    """Where to draw the times; needs matplotlib."""


WAYS = ("narrow", "recompute", "swap", "roomy")


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    engines = {way: Engine(model, settings(arguments, model, way)) for way in WAYS}
    for way, engine in engines.items():
        engine.warm_up(["auto"] if way == "narrow" else ["bf16"])
    rng = np.random.default_rng(0)
    prompts = rng.integers(1000, 20000, (arguments.requests, arguments.prompt_tokens)).tolist()
    compiled = {way: engine.stats().num_compilations for way, engine in engines.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    tokens: dict[str, list[list[int]]] = {}
    kept: dict[str, dict[str, int]] = {}
    for _ in range(arguments.rounds):
        for way, engine in engines.items():
            elapsed, tokens[way], kept[way] = run(engine, arguments, prompts, way)
            seconds[way].append(elapsed)
    later = {way: engine.stats().num_compilations - compiled[way] for way, engine in engines.items()}
    report(arguments, engines, seconds, tokens, kept, later)


def settings(arguments: Arguments, model: LoadedModel, way: str) -> EngineConfig:
    length = arguments.prompt_tokens + arguments.new_tokens
    shape = model.config
    token_bytes = 2 * 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    wanted = arguments.requests * length * token_bytes
    return EngineConfig(
        kv_memory=int(2 * wanted if way == "roomy" else wanted / arguments.load),
        kv_formats=("bf16", "int8", "int4"),
        max_batch_size=arguments.requests,
        max_seq_len=length,
        prefix_cache="off",  # the same prompts come in every round
        preemption="swap" if way == "swap" else "recompute",
    )


def run(
    engine: Engine, arguments: Arguments, prompts: list[list[int]], way: str
) -> tuple[float, list[list[int]], dict[str, int]]:
    """Serves all prompts once: seconds, the tokens of the bf16 requests, and tokens kept in each format at the end."""
    sampling = SamplingParams(max_tokens=arguments.new_tokens, ignore_eos=True)
    start = time.perf_counter()
    requests = [
        engine.add_request(
            prompt, sampling, RequestOptions(kv_precision="auto" if way == "narrow" and i % 3 else "bf16")
        )
        for i, prompt in enumerate(prompts)
    ]
    while engine.has_unfinished:
        engine.step()
    elapsed = time.perf_counter() - start
    kept: dict[str, int] = {}
    for request in requests:
        engine.release(request)
        for name, count in request.kv_tokens.items():
            kept[name] = kept.get(name, 0) + count
    return elapsed, [request.output_token_ids for request in requests[::3]], kept


def report(
    arguments: Arguments,
    engines: dict[str, Engine],
    seconds: dict[str, list[float]],
    tokens: dict[str, list[list[int]]],
    kept: dict[str, dict[str, int]],
    compilations: dict[str, int],
) -> None:
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    table = Table("when memory is short", "s", "of recompute", "preemptions", "pages narrowed", "bf16 tokens unchanged")
    results = {}
    for way, engine in engines.items():
        stats = engine.stats()
        unchanged = tokens[way] == tokens["roomy"]
        results[way] = {
            "seconds": round(medians[way], 2),
            "preemptions": stats.num_preemptions / arguments.rounds,
            "narrowed_pages": stats.kv_counts.narrowed_pages / arguments.rounds,
            "kept_tokens": kept[way],
            "bf16_tokens_unchanged": unchanged,
            "compilations_after_warm_up": compilations[way],
        }
        table.add_row(
            way,
            f"{medians[way]:.1f}",
            f"{medians[way] / medians['recompute']:.2f}",
            f"{stats.num_preemptions / arguments.rounds:.1f}",
            f"{stats.kv_counts.narrowed_pages / arguments.rounds:.0f}",
            "yes" if unchanged else "no",
        )
    if arguments.plot is not None:
        from bar_plot import draw_bars

        draw_bars({way: {"": value} for way, value in medians.items()}, "seconds for the batch", arguments.plot)
    Console().print(table)
    found = {"results": results, "device": jax.devices()[0].device_kind}
    print(json.dumps(dataclasses.asdict(arguments) | found, default=str))


if __name__ == "__main__":
    main()
