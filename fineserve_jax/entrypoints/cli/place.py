"""`fineserve-jax place`: which model goes on which devices."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.entrypoints.cli.placed_plan import plan_of
from fineserve_jax.sim.placement import (
    Estimate,
    Placement,
    Problem,
    exhaustive,
    greedy,
    prism,
    read_problem,
    slab_aware,
)

Rule = Callable[[Problem], tuple[Placement, Estimate]]
RULES: dict[str, Rule] = {"greedy": greedy, "exhaustive": exhaustive, "slab_aware": slab_aware, "prism": prism}


def place(
    workload: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="WORKLOAD.yaml")],
    /,
    *,
    rule: Literal["greedy", "exhaustive", "slab_aware", "prism"] = "greedy",
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
    plan: Path | None = None,
) -> None:
    """Say which model goes on which devices, with how many replicas, and what to expect of it.

    The file lists devices and models with their rates, lengths and targets. Expectations are estimates by
    queueing formulas and rooflines; `fineserve-jax simulate` plays a choice through.

    Args:
        workload: YAML with `devices` and `models`.
        rule: greedy search, exhaustive search for small cases, or the rules of the FineServe paper and of Prism.
        json_output: write the placement there.
        plan: write it there as a plan that `fineserve-jax serve --plan` runs.
    """
    check_can_write("json", json_output)
    check_can_write("plan", plan)
    problem = read_problem(workload)
    placement, expected = RULES[rule](problem)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console.width = 140
    console.print(_models(problem, placement, expected))
    console.print(_devices(problem, expected))
    if plan is not None:
        plan.write_text(plan_of(problem, placement, expected).to_yaml())
    print(f"in time: {expected.in_time_per_s:.2f} of {sum(model.rate for model in problem.models):.2f} requests/s")
    if json_output is not None:
        json_output.write_text(json.dumps(_as_json(problem, placement, expected), indent=1) + "\n")


def _models(problem: Problem, placement: Placement, expected: Estimate) -> Table:
    table = Table("model", "KV", "requests/s", "tp", "replicas", "devices", "in time")
    for number, load in enumerate(problem.models):
        own = [replica for replica in placement if replica.model == number]
        where = ", ".join("+".join(map(str, replica.devices)) for replica in own)
        cells = (f"{load.rate:g}", str(len(own[0].devices)), str(len(own)), where, f"{expected.attainment[number]:.1%}")
        table.add_row(load.model, load.kv_precision, *cells)
    return table


def _devices(problem: Problem, expected: Estimate) -> Table:
    table = Table("device", "kind", "load", "KV memory", "of which each model is expected to need")
    for number, device in enumerate(problem.devices):
        shares = sorted(expected.arena_shares[number].items())
        parts = ", ".join(f"{problem.models[model].model} {share:.0%}" for model, share in shares)
        size = f"{expected.arena_bytes[number] / 1e9:.1f} GB"
        table.add_row(str(number), device.name, f"{expected.load[number]:.2f}", size, parts)
    return table


def _as_json(problem: Problem, placement: Placement, expected: Estimate) -> dict[str, object]:
    return {
        "in_time_per_s": expected.in_time_per_s,
        "models": [
            {
                "model": load.model,
                "attainment": expected.attainment[number],
                "replicas": [list(replica.devices) for replica in placement if replica.model == number],
            }
            for number, load in enumerate(problem.models)
        ],
        "devices": [
            {
                "kind": device.name,
                "load": expected.load[number],
                "kv_bytes": expected.arena_bytes[number],
                "arena_shares": {problem.models[m].model: s for m, s in expected.arena_shares[number].items()},
            }
            for number, device in enumerate(problem.devices)
        ],
    }
