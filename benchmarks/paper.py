"""Simulated curves: this engine beside others' rules, over load, mix and memory.

    python benchmarks/paper.py [--seconds 20] [--output docs/paper] [--table TABLE.csv]

Three settings on one H100 with 80 GB. *Sharing*: Llama-3.1-8B in 16 bits, FP8 and AWQ share the device, each request
with targets of a second for its first token and 100 ms for each further one (the FineServe paper's setting). *Many*:
eight variants of 8B models, each of which serves bf16, int8 and int4 KV, share what their weights leave.
*Pressure*: one 16-bit Llama-3.1-8B that serves bf16, int8 and int4 KV, whichever of them its requests name, with little
memory for it and no targets (its summary's setting). Lengths are those of chats. Steps take as long as the measured
table says for sharing, where one is given or lies in `../shared`, and as a roofline says for the others. A run goes on
until all is served, so its throughput includes the draining of the queue.

Writes the figures of each curve, a plot of it, and a page of tables about all curves whose figures are there, so that
they can be run one by one (`--only`). Prints one line of JSON at the end.
"""

import dataclasses
import functools
import json
import operator
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tyro

from fineserve_jax.scheduler.devices import get_device
from fineserve_jax.sim.charts import line_chart
from fineserve_jax.sim.cost_table import CostTable, read_table
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.experiment import Experiment, parse_mix, with_targets
from fineserve_jax.sim.systems import SYSTEMS, Cluster, System
from fineserve_jax.sim.workload import assign, draw

SHARED = Path(__file__).parents[2] / "shared" / "data" / "profiles" / "fineserve_apex_cost.csv"
TTFT_S, TPOT_S = 1.0, 0.1
ALL_FORMATS = ("bf16", "int8", "int4")
THREE = ("llama-3.1-8b@bf16/bf16", "llama-3.1-8b@fp8/fp8", "llama-3.1-8b@awq/bf16")
EIGHT = (
    *(f"llama-3.1-8b@{weights}" for weights in ("bf16", "fp8", "int8", "awq", "qoq")),
    *(f"llama-3-8b@{weights}" for weights in ("fp8", "awq", "qoq")),
)
FIRST_COME = dataclasses.replace(SYSTEMS["fineserve"], name="fcfs", policy="fcfs")  # in all else as this engine
LABELS = {
    "attainment": "share of requests in time",
    "output_tokens_per_s": "tokens/s",
    "end_to_end.p99": "99th percentile of the whole time, s",
}
INTRODUCTION = """# Simulated curves

Written by `benchmarks/paper.py`; the figures lie beside the plots. `simulator.md` says what is assumed.
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    seconds: float | None = None
    """How long requests keep arriving in each run; each curve's own time if none is given."""
    seed: int = 0
    output: Path = Path("docs/paper")
    """Plots and the page PATH.md."""
    table: Path | None = None
    """Measured latencies for the sharing setting."""
    only: tuple[str, ...] = ()
    """Names of curves, or parts of them, to run; all if none is given."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One workload: every system serves it."""

    x: float
    rate: float
    mix: tuple[str, ...]
    kv_bytes: float | None
    targets: bool
    burstiness: float = 1.0
    served: tuple[str, ...] = ()
    """KV formats that requests may name besides those of the mix."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """Points along one axis, and the figure that is looked at: a key of `LABELS`."""

    name: str
    title: str
    axis: str
    points: tuple[Point, ...]
    figure: str
    seconds: float = 20.0
    measured: bool = False
    """Whether steps take as long as the measured table says, where there is one."""
    systems: tuple[System, ...] = tuple(SYSTEMS.values())


Figures = dict[str, Any]
"""`Summary.to_dict()` of one run."""
Results = dict[str, list[Figures]]
"""System -> its figures, one a point."""


def shared_mix(shares: Sequence[float]) -> tuple[str, ...]:
    return tuple(f"{word}={share}" for word, share in zip(THREE, shares, strict=True))


def many_mix() -> tuple[str, ...]:
    """The eight variants alike, each with the three KV formats alike."""
    return tuple(f"{model}/{kv_format}" for model in EIGHT for kv_format in ALL_FORMATS)


def kv_mix(narrow: float) -> tuple[str, ...]:
    """A mix of KV formats in which int4 has this share, and bf16 and int8 divide the rest."""
    shares = {"int4": narrow, "int8": (1 - narrow) / 2, "bf16": (1 - narrow) / 2}
    return tuple(f"llama-3.1-8b/{name}={share}" for name, share in shares.items() if share > 0)


def curves() -> list[Curve]:
    skewed, even = shared_mix((8, 1, 1)), shared_mix((1, 1, 1))
    rates = (20.0, 40.0, 60.0, 80.0)
    low, little = (10.0, 20.0, 30.0), (0.5, 1.0, 2.0, 4.0)
    moderate = (20.0, 27.0, 33.0, 40.0)
    mixed = kv_mix(0.8)
    attainment, tokens = "attainment", "output_tokens_per_s"
    return [
        Curve("sharing-skewed", "Three variants, 8:1:1, Poisson", "requests/s",
              tuple(Point(r, r, skewed, None, True) for r in rates), attainment, seconds=40.0, measured=True),
        Curve("sharing-bursty", "Three variants, 8:1:1, bursty (CV 3)", "requests/s",
              tuple(Point(r, r, skewed, None, True, 3.0) for r in rates[::2]), attainment, measured=True),
        Curve("sharing-even", "Three variants, 1:1:1, Poisson", "requests/s",
              tuple(Point(r, r, even, None, True) for r in low), attainment, measured=True),
        Curve("sharing-memory", "Three variants, 1:1:1, 20 requests/s", "GB for KV",
              tuple(Point(g, 20.0, even, g * 1e9, True) for g in (2.0, 4.0, 16.0)), attainment, measured=True),
        Curve("many", "Eight variants, three KV formats each", "requests/s",
              tuple(Point(r, r, many_mix(), None, True) for r in rates[:3]), tokens, seconds=60.0),
        Curve("pressure-load", "80 % int4, 4 GB for KV", "requests/s",
              tuple(Point(r, r, mixed, 4e9, False, served=ALL_FORMATS) for r in rates), tokens),
        Curve("pressure-mix", "4 GB for KV, 60 requests/s", "share of int4",
              tuple(Point(s, 60.0, kv_mix(s), 4e9, False, served=ALL_FORMATS) for s in (0.0, 0.33, 0.67, 1.0)), tokens),
        Curve("pressure-memory", "80 % int4, 60 requests/s", "GB for KV",
              tuple(Point(g, 60.0, mixed, g * 1e9, False, served=ALL_FORMATS) for g in (1.0, 2.0, 4.0, 16.0)), tokens),
        Curve("pressure-most", "All int4, 100 requests/s", "GB for KV",
              tuple(Point(g, 100.0, kv_mix(1.0), g * 1e9, False, served=ALL_FORMATS) for g in little), tokens),
        Curve("latency", "Three formats alike, 4 GB for KV", "requests/s",
              tuple(Point(r, r, kv_mix(1 / 3), 4e9, False) for r in moderate), "end_to_end.p99",
              systems=(SYSTEMS["fineserve"], FIRST_COME, SYSTEMS["uniform"])),
        Curve("one-precision", "All bf16, 4 GB for KV", "requests/s",
              tuple(Point(r, r, ("llama-3.1-8b/bf16",), 4e9, False) for r in low), tokens),
    ]  # fmt: skip


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    table = arguments.table or (SHARED if SHARED.exists() else None)
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.process_time()
    for curve in curves():
        if not arguments.only or any(part in curve.name for part in arguments.only):
            run_curve(curve, table if curve.measured else None, arguments)
    paths = [(curve, path_of(curve, arguments)) for curve in curves()]
    done = [(curve, json.loads(path.read_text())) for curve, path in paths if path.exists()]
    sections = [section(curve, written, arguments.output.name) for curve, written in done]
    arguments.output.with_suffix(".md").write_text("\n".join([INTRODUCTION, *sections]))
    gains = {curve.name: gains_of(curve, written["results"]) for curve, written in done}
    print(json.dumps({"seconds": arguments.seconds, "cpu_s": round(time.process_time() - start), "gains": gains}))


def path_of(curve: Curve, arguments: Arguments) -> Path:
    return arguments.output / f"{curve.name}.json"


def run_curve(curve: Curve, table: Path | None, arguments: Arguments) -> None:
    """Runs all systems at all points; writes figures and plot."""
    seconds, seed = arguments.seconds or curve.seconds, arguments.seed
    results: Results = {system.name: [] for system in curve.systems}
    for point in curve.points:
        experiment = experiment_of(point, table, seconds, seed)
        for system in curve.systems:
            results[system.name].append(experiment.run(system).summary.to_dict())
    setting = {"seconds": seconds, "seed": seed, "table": table is not None}
    points = [dataclasses.asdict(point) for point in curve.points]
    written = {"setting": setting, "points": points, "results": results}
    path_of(curve, arguments).write_text(json.dumps(_rounded(written)) + "\n")
    path_of(curve, arguments).with_suffix(".svg").write_text(plot(curve, results))
    print(f"{curve.name}: {gains_of(curve, results)}", flush=True)


def _rounded(value: Any) -> Any:
    """Six digits are enough of any figure."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


def experiment_of(point: Point, table: Path | None, seconds: float, seed: int) -> Experiment:
    kinds, formats = parse_mix(point.mix)
    if point.targets:
        kinds = with_targets(kinds, TTFT_S, TPOT_S)
    device = get_device("h100")
    arrivals = draw(point.rate, seconds, seed, burstiness=point.burstiness)
    served = {model.name: tuple(dict.fromkeys((*names, *point.served))) for model, names in formats.items()}
    cluster = Cluster(device, tuple(formats), served, point.kv_bytes)
    timers = {}
    if table is not None:
        costs = CostTable(read_table(table), device, Efficiency())
        timers = {model.name: costs.profile(model, names[0]) for model, names in formats.items()}
    settings = {"max_batch_size": 512, "max_chunk_tokens": 2048}
    return Experiment(assign(arrivals, kinds, seed), cluster, timers, settings)


# -- what came out -----------------------------------------------------------------------------------------------


def gains_of(curve: Curve, results: Results) -> dict[str, dict[str, float]]:
    """Against each other system: the largest and the least ratio of the curve's figure, and where the largest is;
    and the largest ratios of throughput. Of latencies, small ratios are good."""
    gains = {}
    for name in results:
        if name == "fineserve":
            continue
        ratios = ratios_of(results, name, curve.figure)
        best = max(range(len(ratios)), key=ratios.__getitem__)
        gains[name] = {
            "most": round(max(ratios), 2),
            "at": curve.points[best].x,
            "least": round(min(ratios), 2),
            "most_tokens": round(max(ratios_of(results, name, "output_tokens_per_s")), 2),
            "most_tokens_in_time": round(max(ratios_of(results, name, "goodput_tokens_per_s")), 2),
        }
    return gains


def ratios_of(results: Results, name: str, of: str) -> list[float]:
    pairs = zip(results["fineserve"], results[name], strict=True)
    return [figure_of(own, of) / max(figure_of(other, of), 1e-9) for own, other in pairs]


def figure_of(figures: Figures, path: str) -> float:
    """The figure at a path of keys, joined by dots."""
    return functools.reduce(operator.getitem, path.split("."), figures)


def plot(curve: Curve, results: Results) -> str:
    lines = {
        name: [(point.x, figure_of(figures, curve.figure)) for point, figures in zip(curve.points, ones, strict=True)]
        for name, ones in results.items()
    }
    return line_chart(curve.title, curve.axis, LABELS[curve.figure], lines) + "\n"


def section(curve: Curve, written: Figures, folder: str) -> str:
    results, setting = written["results"], written["setting"]
    timed = "the measured table" if setting["table"] else "the roofline"
    shown = [("tokens/s", "output_tokens_per_s", ".0f")]
    if curve.points[0].targets:
        shown = [("in time", "attainment", ".1%"), *shown, ("tokens/s in time", "goodput_tokens_per_s", ".0f")]
    elif curve.figure == "end_to_end.p99":
        shown += [(f"whole time of {name}, p99, s", f"end_to_end_p99_by_format.{name}", ".2f") for name in ALL_FORMATS]
    else:
        shown += [("TTFT p99, s", "ttft.p99", ".1f"), ("preemptions", "num_preemptions", "d")]
    said = f"Requests arrive for {setting['seconds']:g} s; steps take as long as {timed} says."
    lines = [f"## {curve.title}", "", said, "", f"![{curve.title}]({folder}/{curve.name}.svg)", ""]
    for title, path, spec in shown:
        rows = ([name, *(format(figure_of(figures, path), spec) for figures in ones)] for name, ones in results.items())
        lines += [*_table([f"{title}, by {curve.axis}", *(f"{point.x:g}" for point in curve.points)], rows), ""]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    ruled = ["|" + "|".join(["---", *["---:"] * (len(head) - 1)]) + "|"]
    return ["| " + " | ".join(head) + " |", *ruled, *("| " + " | ".join(row) + " |" for row in rows)]


if __name__ == "__main__":
    main()
