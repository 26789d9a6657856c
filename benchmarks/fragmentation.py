"""How much of the memory that slabs reserve is used, and how many requests run at a time: host only, no device.

    python benchmarks/fragmentation.py --plot docs/slabs.png

Requests in bf16, int8 and int4, a third each and shuffled, arrive faster than memory can serve them; then no more
arrive, and those there are end. The scheduler, the KV manager and the slabs are the engine's; only the model is left
out. Every way to divide memory gets the same requests. While a step computes, two ratios are taken:

    reserved / cached     bytes of the slabs in use, over the exact bytes of the keys and values that are in them
    reserved / granted    the same, over the exact bytes of all tokens that pages were given for: those of a prompt
                          that was admitted count before they are computed

The second table compares how many requests run at a time, with those of `uniform` in the same memory: all in int4, and
in the mix; by page size; from the warm-up on, and "at first" for as many steps again as that took. The last line is
JSON.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table
from slab_world import MIX, MODEL, Lengths, Memory, World, make_classes, read_lengths

from fineserve_jax.kv.usage import measure_usage

WAYS = {
    "elastic": Memory(),
    "elastic, no compaction": Memory(compacts=False),
    "partitioned": Memory("partitioned"),
    "uniform": Memory("uniform"),
    "slabs of the LCM, no compaction": Memory(slabs="lcm", compacts=False),
}
GOAL, INT4_GOAL, MIX_GOAL = 1.03, 3.5, 1.9


@dataclasses.dataclass(frozen=True)
class Arguments:
    trace: Path = Path("../shared/data/traces/azure_llm_2023_conv.csv")
    """Azure conversation lengths; where it is not, lengths are drawn from its percentiles."""
    contexts: tuple[int, ...] = (8192, 2048)
    """Lengths are scaled so that the longest request takes so many tokens."""
    page_sizes: tuple[int, ...] = (16, 32, 64)
    kv_memory: int = 2 * 2**30
    """Bytes of the arena at the first context, less in proportion at others."""
    load: float = 1.5
    """Memory that arriving requests would take over time, of all there is."""
    ageing_s: tuple[float, ...] = (30.0, 3600.0)
    """No request is overtaken by one that came so much later; the first is the engine's default."""
    steps: int = 1500
    """Steps in which requests arrive, of 0.05 s each."""
    warm_up: int = 400
    every: int = 10
    """Steps between samples."""
    chunk_tokens: int = 8192
    seed: int = 0
    plot: Path | None = None


@dataclasses.dataclass(frozen=True)
class Samples:
    """Of a run, each [samples]: step, bytes, ratio of reserved to cached bytes between two steps, running requests."""

    step: np.ndarray
    reserved: np.ndarray
    cached: np.ndarray
    granted: np.ndarray
    between: np.ndarray
    running: np.ndarray
    usable: int
    moved: float
    """Bytes moved, of those that the steps read."""

    def where(self, chosen: np.ndarray) -> "Samples":
        arrays = {f.name: getattr(self, f.name)[chosen] for f in dataclasses.fields(self)[:6]}
        return dataclasses.replace(self, **arrays)

    def summary(self) -> dict[str, Any]:
        ratios = {
            "cached": self.reserved / self.cached,
            "granted": self.reserved / self.granted,
            "between_steps": self.between,
        }
        numbers: dict[str, Any] = {"samples": len(self.step), "running": round(float(self.running.mean()), 1)}
        for name, ratio in ratios.items():
            values = {"max": ratio.max(), "p99": np.quantile(ratio, 0.99), "mean": ratio.mean()}
            numbers[name] = {kind: round(float(value), 4) for kind, value in values.items()}
        return numbers | {"moved": round(self.moved, 4)}


@dataclasses.dataclass(frozen=True)
class Case:
    """What a run is of."""

    memory: Memory
    context: int
    page_size: int
    mix: tuple[str, ...] = MIX
    ageing_s: float = 30.0
    drains: bool = False


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    console = Console(width=140)
    lengths = {context: read_lengths(arguments.trace, context) for context in arguments.contexts}
    ratios, runs = compare_ratios(arguments, lengths, console)
    concurrency = [
        compare_concurrency(arguments, lengths[context], context, page_size)
        for context in arguments.contexts
        for page_size in arguments.page_sizes
    ]
    rows = [row for rows in concurrency for row in rows]
    show_concurrency(rows, console)
    if arguments.plot is not None:
        from slab_plot import draw  # needs matplotlib

        draw(runs, arguments.warm_up, arguments.steps, arguments.plot)
    settings = json.loads(json.dumps(dataclasses.asdict(arguments), default=str))
    print(json.dumps({**settings, "lengths": lengths[arguments.contexts[0]].source, "ratios": ratios, "rows": rows}))


def compare_ratios(
    arguments: Arguments, lengths: dict[int, Lengths], console: Console
) -> tuple[dict[str, Any], dict[str, Samples]]:
    """Every way to divide memory, at the first context and page size: under load, and as it ends."""
    context, page_size = arguments.contexts[0], arguments.page_sizes[0]
    title = f"context {context}, pages of {page_size} tokens; goal for elastic: {GOAL}"
    table = Table(
        "reserved over",
        "",
        "cached: max",
        "p99",
        "mean",
        "granted: max",
        "p99",
        "mean",
        "running",
        "moved",
        title=title,
    )
    ratios, runs = {}, {}
    for name, memory in WAYS.items():
        samples = runs[name] = run(arguments, lengths[context], Case(memory, context, page_size, drains=True))
        under_load = (samples.step >= arguments.warm_up) & (samples.step < arguments.steps)
        ending = (samples.step >= arguments.steps) & (samples.reserved >= 0.1 * samples.usable)
        for phase, chosen in {"load": under_load, "end, to a tenth": ending}.items():
            numbers = ratios[f"{name}: {phase}"] = samples.where(chosen).summary()
            shown = [f"{numbers[kind][part]:.3f}" for kind in ("cached", "granted") for part in ("max", "p99", "mean")]
            table.add_row(name, phase, *shown, f"{numbers['running']:.0f}", f"{numbers['moved']:.2%}")
    console.print(table)
    return ratios, runs


def compare_concurrency(arguments: Arguments, lengths: Lengths, context: int, page_size: int) -> list[dict[str, Any]]:
    """Requests that run at a time, elastic over uniform."""

    def load(way: str, mix: tuple[str, ...], ageing_s: float) -> list[dict[str, Any]]:
        """Figures from the warm-up on: of as many steps again, and of all."""
        samples = run(arguments, lengths, Case(WAYS[way], context, page_size, mix, ageing_s))
        after = samples.step >= arguments.warm_up
        return [samples.where(chosen).summary() for chosen in (after & (samples.step < 2 * arguments.warm_up), after)]

    rows = []
    loads = [("int4", ("int4",), arguments.ageing_s[0]), *(("mix", MIX, ageing_s) for ageing_s in arguments.ageing_s)]
    for name, mix, ageing_s in loads:
        (early_uniform, uniform), (early, elastic) = (load(way, mix, ageing_s) for way in ("uniform", "elastic"))
        rows.append(
            {
                "context": context,
                "page_size": page_size,
                "requests": name,
                "ageing_s": ageing_s,
                "elastic": elastic["running"],
                "uniform": uniform["running"],
                "ratio": round(elastic["running"] / uniform["running"], 3),
                "early_ratio": round(early["running"] / early_uniform["running"], 3),
                "cached_max": elastic["cached"]["max"],
                "granted_max": elastic["granted"]["max"],
            }
        )
    return rows


def show_concurrency(rows: list[dict[str, Any]], console: Console) -> None:
    goals = f"goals: {INT4_GOAL} for int4, {MIX_GOAL} for the mix, {GOAL} for reserved bytes; * where reached"
    table = Table(title=f"requests running at a time; {goals}")
    for heading in ("context", "page", "requests", "ageing", "elastic", "uniform", "times", "times at first"):
        table.add_column(heading)
    table.add_column("reserved / cached: max")
    table.add_column("/ granted: max")
    for row in rows:
        goal = INT4_GOAL if row["requests"] == "int4" else MIX_GOAL
        table.add_row(
            *(str(row[key]) for key in ("context", "page_size", "requests", "ageing_s")),
            f"{row['elastic']:.0f}",
            f"{row['uniform']:.0f}",
            *(f"{row[key]:.2f}" + (" *" if row[key] >= goal else "") for key in ("ratio", "early_ratio")),
            f"{row['cached_max']:.3f}" + (" *" if row["cached_max"] <= GOAL else ""),
            f"{row['granted_max']:.3f}" + (" *" if row["granted_max"] <= GOAL else ""),
        )
    console.print(table)


def run(arguments: Arguments, lengths: Lengths, case: Case) -> Samples:
    """Serve one case's requests, sampling."""
    classes, unit_bytes = make_classes(case.page_size)
    kv_bytes = arguments.kv_memory * case.context // arguments.contexts[0]
    world = World(case.memory, kv_bytes, classes, unit_bytes, case.ageing_s, arguments.chunk_tokens)
    rng = np.random.default_rng(arguments.seed)
    token_bytes = np.mean([classes[MODEL, name].page_bytes / case.page_size for name in case.mix])
    # A request holds its prompt and on average half of its output, for as many steps as it has output tokens.
    byte_steps = token_bytes * ((lengths.prompts + lengths.outputs / 2) * lengths.outputs).mean()
    rate = arguments.load * kv_bytes / byte_steps
    formats = _shuffled(case.mix, rng)
    rows, between, number, step, read = [], [], 0, 0, 0.0
    while step < arguments.steps or (case.drains and world.scheduler.has_unfinished):
        for _ in range(rng.poisson(rate) if step < arguments.steps else 0):
            pick = rng.integers(len(lengths.prompts))
            world.add(number, next(formats), int(lengths.prompts[pick]), int(lengths.outputs[pick]))
            number += 1
        sampled = step % arguments.every == 0
        for _ in world.step():
            if sampled:
                usage = measure_usage(world.kv)
                rows.append(
                    (step, usage.reserved_bytes, usage.needed_bytes, world.granted_bytes, len(world.kv.requests))
                )
                read += arguments.every * usage.needed_bytes
        if sampled:
            usage = measure_usage(world.kv)
            between.append(usage.reserved_bytes / max(usage.needed_bytes, 1))
        step += 1
    steps, reserved, cached, granted, running = np.array(rows).T
    return Samples(
        steps,
        reserved,
        np.maximum(cached, 1),
        np.maximum(granted, 1),
        np.array(between),
        running,
        usage.usable_bytes,
        world.moved_bytes / read,
    )


def _shuffled(mix: tuple[str, ...], rng: np.random.Generator) -> Iterator[str]:
    """Formats without end, in equal parts, shuffled."""
    while True:
        yield from map(str, rng.permutation(mix * 10))


if __name__ == "__main__":
    main()
