"""Requests that begin alike: how much is computed, and how soon the first token comes.

    python benchmarks/prefix.py --prefix-tokens 512 --requests 32

An engine with the prefix cache and one without take turns: for each KV format, requests that come one after the other
(time to first token), and then a batch that arrives together (what is counted: prompt tokens computed). Every round has
a prefix of its own, so the first request of a round finds nothing. Printed are medians, their ratios, and a line of
JSON.
"""

import dataclasses
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path

import jax
import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import load_model
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    prefix_tokens: int = 512
    own_tokens: int = 16
    requests: int = 32
    rounds: int = 5
    singles: int = 4
    """Requests of a round that come one after the other, besides the first."""
    formats: tuple[str, ...] = ("bf16", "int8", "int4")
    kv_memory: str = "1GiB"
    plot: Path | None = None
    """Where to draw the times to the first token; needs matplotlib."""


@dataclasses.dataclass
class Found:
    """What one engine gave in one format."""

    first_s: list[float] = dataclasses.field(default_factory=list)
    later_s: list[float] = dataclasses.field(default_factory=list)
    computed_tokens: list[int] = dataclasses.field(default_factory=list)


SAMPLING = SamplingParams(max_tokens=2, ignore_eos=True)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    engines = {name: Engine(model, settings(arguments, name)) for name in ("exact", "off")}
    for engine in engines.values():
        engine.warm_up(arguments.formats)
    rng = np.random.default_rng(0)
    found: dict[tuple[str, str], Found] = defaultdict(Found)
    for _ in range(arguments.rounds):
        for kv_format in arguments.formats:
            for prefix_cache, engine in engines.items():
                measure(engine, arguments, kv_format, rng, found[kv_format, prefix_cache])
    report(arguments, found, {name: engine.stats().num_compilations for name, engine in engines.items()})


def settings(arguments: Arguments, prefix_cache: str) -> EngineConfig:
    return EngineConfig(
        kv_memory=arguments.kv_memory,
        max_batch_size=arguments.requests,
        max_seq_len=arguments.prefix_tokens + arguments.own_tokens + 16,
        kv_formats=tuple(dict.fromkeys([*arguments.formats, "bf16"])),
        prefix_cache=prefix_cache,
    )


def measure(engine: Engine, arguments: Arguments, kv_format: str, rng: np.random.Generator, found: Found) -> None:
    """One round in one format."""

    def prompts(count: int) -> list[list[int]]:
        prefix = rng.integers(1000, 20000, arguments.prefix_tokens).tolist()
        return [prefix + rng.integers(1000, 20000, arguments.own_tokens).tolist() for _ in range(count)]

    first, *later = (first_token_s(engine, prompt, kv_format) for prompt in prompts(1 + arguments.singles))
    found.first_s.append(first)
    found.later_s += later
    before = engine.stats().num_prompt_tokens
    for prompt in prompts(arguments.requests):
        engine.add_request(prompt, SAMPLING, RequestOptions(kv_precision=kv_format))
    while engine.has_unfinished:
        engine.step()
    found.computed_tokens.append(engine.stats().num_prompt_tokens - before)


def first_token_s(engine: Engine, prompt: list[int], kv_format: str) -> float:
    """Seconds from a request's arrival to its first token, with nothing else to do."""
    start = time.perf_counter()
    request = engine.add_request(prompt, SAMPLING, RequestOptions(kv_precision=kv_format))
    while not request.num_output_tokens:
        engine.step()
    seconds = time.perf_counter() - start
    while engine.has_unfinished:
        engine.step()
    return seconds


def report(arguments: Arguments, measured: dict[tuple[str, str], Found], compilations: dict[str, int]) -> None:
    table = Table("KV format", "prefix cache", "first, ms", "later, ms", "faster", "prompt tokens of a batch computed")
    results: dict[str, dict[str, float]] = {}
    for (kv_format, prefix_cache), runs in measured.items():
        first, later = (1000 * statistics.median(times) for times in (runs.first_s, runs.later_s))
        results[f"{kv_format}, {prefix_cache}"] = {
            "first_ms": round(first, 1),
            "later_ms": round(later, 1),
            "faster": round(first / later, 2),
            "computed_tokens": statistics.median(runs.computed_tokens),
        }
        counted = f"{statistics.median(runs.computed_tokens):,.0f}"
        table.add_row(kv_format, prefix_cache, f"{first:.0f}", f"{later:.0f}", f"{first / later:.1f} x", counted)
    if arguments.plot is not None:
        from bar_plot import draw_bars

        times = {name: {"first": of["first_ms"], "later": of["later_ms"]} for name, of in results.items()}
        draw_bars(times, "ms to the first token", arguments.plot)
    Console().print(table)
    asked = arguments.requests * (arguments.prefix_tokens + arguments.own_tokens)
    device = jax.devices()[0].device_kind
    found = {"asked_tokens": asked, "results": results, "device": device}
    print(json.dumps(dataclasses.asdict(arguments) | found, default=str))


if __name__ == "__main__":
    main()
