"""How well cost models predict measured latencies: fitted to some rows of a table, and from a roofline alone.

    python benchmarks/cost_model.py [TABLE.csv ...]

Without an argument it takes the tables that lie in `../shared/data/profiles`, if they do. Of every configuration
(model, format, tensor-parallel degree, share of the cores) a part of the rows is held back, drawn by seed, the model
is fitted to the others, and the held-back rows are predicted. The roofline sees no row at all; it is tried as the
data sheet has it, with what engines without recorded graphs need to launch a layer's kernels (`--layer-overhead-s`),
and with that figure taken from one row of each table, the smallest batch of a 16-bit 8B model.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.scheduler import StepProfile
from fineserve_jax.scheduler.devices import DeviceSpec, get_device
from fineserve_jax.sim.cost_table import Configuration, CostTable, Measurement, read_table, roofline_profile
from fineserve_jax.sim.efficiency import Efficiency

SHARED = Path(__file__).parents[2] / "shared" / "data" / "profiles"
Errors = dict[Configuration, list[tuple[float, float]]]


@dataclasses.dataclass(frozen=True)
class Arguments:
    tables: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    device: str = "h100"
    held_back: float = 0.25
    """Share of each configuration's rows that the fit does not see."""
    seeds: int = 5
    layer_overhead_s: float = 330e-6


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    device = get_device(arguments.device)
    tables = arguments.tables or tuple(sorted(SHARED.glob("*_cost.csv")))
    results = {}
    for path in tables:
        rows = read_table(path)
        fitted = held_back_errors(rows, device, arguments)
        eager = Efficiency(step_overhead_s=0.0, layer_overhead_s=arguments.layer_overhead_s)
        calibrated = Efficiency(step_overhead_s=0.0, layer_overhead_s=launch_seconds(rows))
        by_roofline = {
            "data sheet": roofline_errors(rows, device, Efficiency()),
            f"and {arguments.layer_overhead_s * 1e6:.0f} us a layer": roofline_errors(rows, device, eager),
            f"and {calibrated.layer_overhead_s * 1e6:.0f} us, from one row": roofline_errors(rows, device, calibrated),
        }
        results[path.stem] = report(path.stem, fitted, by_roofline)
    print(json.dumps({"device": arguments.device, "held_back": arguments.held_back, "tables": results}))


def held_back_errors(rows: Iterable[Measurement], device: DeviceSpec, arguments: Arguments) -> Errors:
    """Relative errors of TTFT and TPOT of the rows that a fit did not see, over several draws of them."""
    groups = by_configuration(rows)
    errors: Errors = defaultdict(list)
    for seed in range(arguments.seeds):
        rng = np.random.default_rng(seed)
        for configuration, group in groups.items():
            order = rng.permutation(len(group))
            num_held = max(1, round(arguments.held_back * len(group)))
            table = CostTable([group[i] for i in order[num_held:]], device, Efficiency())
            errors[configuration] += errors_of(table.profiles[configuration], [group[i] for i in order[:num_held]])
    return errors


def roofline_errors(rows: Iterable[Measurement], device: DeviceSpec, efficiency: Efficiency) -> Errors:
    return {
        configuration: errors_of(roofline_profile(configuration, device, efficiency), group)
        for configuration, group in by_configuration(rows).items()
    }


def errors_of(profile: StepProfile, rows: Iterable[Measurement]) -> list[tuple[float, float]]:
    return [
        (
            abs(profile.predict(row.prefill()) - row.ttft_s) / row.ttft_s,
            abs(profile.predict(row.decode()) - row.tpot_s) / row.tpot_s,
        )
        for row in rows
    ]


def launch_seconds(rows: Iterable[Measurement]) -> float:
    """Seconds a layer of the smallest decode step of a 16-bit 8B model on one device."""
    small = [row for row in rows if row.configuration == Configuration("llama-3.1-8b", "org") and row.batch_size == 1]
    return min(row.tpot_s for row in small) / small[0].configuration.variant.shape.num_layers


def by_configuration(rows: Iterable[Measurement]) -> dict[Configuration, list[Measurement]]:
    groups: defaultdict[Configuration, list[Measurement]] = defaultdict(list)
    for row in rows:
        groups[row.configuration].append(row)
    return groups


def medians(errors: Errors, only: Iterable[Configuration]) -> dict[str, float]:
    listed = [pair for configuration in only for pair in errors.get(configuration, ())]
    ttft, tpot = np.median(np.array(listed), axis=0)
    return {"ttft": round(float(ttft), 4), "tpot": round(float(tpot), 4)}


def report(name: str, fitted: Errors, by_roofline: dict[str, Errors]) -> dict[str, dict[str, float]]:
    """Prints the medians of one table; those that are asked for."""
    on_one_gpu = [c for c in fitted if c.tp == 1 and c.share == 100 and c.model.endswith("8b")]
    figures = {"fitted, held-back rows": medians(fitted, fitted)}
    figures["fitted, 8B on one GPU"] = medians(fitted, on_one_gpu)
    for label, errors in by_roofline.items():
        figures[f"roofline, {label}, 8B on one GPU"] = medians(errors, on_one_gpu)
        figures[f"roofline, {label}, all whole GPUs"] = medians(errors, [c for c in errors if c.share == 100])
    table = Table("cost model", "median error of TTFT", "of TPOT", title=name)
    for label, figure in figures.items():
        table.add_row(label, f"{figure['ttft']:.1%}", f"{figure['tpot']:.1%}")
    Console(width=110).print(table)
    return figures


if __name__ == "__main__":
    main()
