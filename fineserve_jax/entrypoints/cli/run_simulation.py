"""What `fineserve-jax simulate` does with its flags."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.entrypoints.cli.simulate_flags import ReportFlags, ServingFlags, StepTimeFlags, WorkloadFlags
from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler import load_profiles
from fineserve_jax.scheduler.devices import get_device
from fineserve_jax.sim.cost_table import CostTable, read_table
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.experiment import Experiment, Result, check_arrivals, parse_mix, with_targets
from fineserve_jax.sim.models import ModelVariant
from fineserve_jax.sim.report import COLUMNS, write_report
from fineserve_jax.sim.simulator import StepTimer
from fineserve_jax.sim.systems import Cluster, get_system
from fineserve_jax.sim.trace_output import write_trace
from fineserve_jax.sim.traces import read_workload
from fineserve_jax.sim.workload import Arrival, Kind, assign, draw

DEFAULT_MIX = ("llama-3.1-8b/bf16", "llama-3.1-8b/int8", "llama-3.1-8b/int4")
DEFAULT_SYSTEMS = ("fineserve", "uniform")
SHOWN = ("requests", "dropped", "tokens/s", "tokens/s in time", "in time", "TTFT p99, s", "TPOT p99, s", "preemptions")

Formats = Mapping[ModelVariant, tuple[str, ...]]
"""KV formats of each model."""


def run_simulation(
    workload: WorkloadFlags, serving: ServingFlags, step_times: StepTimeFlags, report: ReportFlags
) -> None:
    """Run all systems at all rates, show a table of them and write what is asked for. Raises ConfigError."""
    for option, path in (("html", report.html), ("perfetto", report.perfetto), ("json", report.json_output)):
        check_can_write(option, path)
    kinds, formats = parse_mix(workload.mix or DEFAULT_MIX, serving.tp)
    systems = [get_system(name) for name in serving.system or DEFAULT_SYSTEMS]
    arrivals = _arrivals(workload, kinds)
    cluster = _cluster(serving, step_times, formats)
    check_arrivals(arrivals, cluster)
    settings: dict[str, object] = {
        "max_batch_size": serving.max_batch_size,
        "max_chunk_tokens": serving.max_chunk_tokens,
    }
    if serving.policy is not None:
        settings["policy"] = serving.policy
    experiment = Experiment(arrivals, cluster, _timers(step_times, cluster, formats), settings)
    scales = sorted(workload.rate_scale) or [1.0]
    results = experiment.run_all(systems, scales, record_steps=report.perfetto is not None)
    _show(results)
    _write(report, results, title=f"{len(arrivals)} requests on {serving.tp} x {serving.device}")


def _target(seconds: float | None) -> float | None:
    """A latency target; None for 0 and infinity, which are none."""
    return seconds if seconds and math.isfinite(seconds) else None


def _arrivals(workload: WorkloadFlags, kinds: list[Kind]) -> list[Arrival]:
    kinds = with_targets(kinds, _target(workload.ttft_slo_s), _target(workload.tpot_slo_s))
    if workload.trace is not None:
        arrivals = read_workload(workload.trace, kinds, workload.seed)
    else:
        drawn = draw(workload.rate, workload.seconds, workload.seed, burstiness=workload.burstiness)
        arrivals = assign(drawn, kinds, workload.seed)
    if not arrivals:
        raise ConfigError("the workload is empty: no request arrives; give a longer --seconds or a higher --rate")
    return arrivals


def _cluster(serving: ServingFlags, step_times: StepTimeFlags, formats: Formats) -> Cluster:
    return Cluster(
        get_device(serving.device),
        tuple(formats),
        {model.name: names for model, names in formats.items()},
        None if serving.kv_memory is None else _bytes(serving.kv_memory),
        efficiency=_efficiency(step_times),
        prefix_cache="exact" if serving.prefix_cache else "off",
    )


def _efficiency(step_times: StepTimeFlags) -> Efficiency:
    overhead_us = step_times.layer_overhead_us
    if not 0 <= overhead_us < math.inf:
        raise ConfigError(f"layer_overhead_us={overhead_us:g} is no time; give 0 or more microseconds")
    if not overhead_us:
        return Efficiency()
    if step_times.table is not None or step_times.step_profile is not None:
        raise ConfigError("--table and --step-profile are measured, launches included; leave out --layer-overhead-us")
    return Efficiency(step_overhead_s=0.0, layer_overhead_s=overhead_us * 1e-6)


def _timers(step_times: StepTimeFlags, cluster: Cluster, formats: Formats) -> dict[str, StepTimer]:
    """The cost models that the user gave: by model name, or for a lone profile whatever the model."""
    table, step_profile = step_times.table, step_times.step_profile
    if table is not None and step_profile is not None:
        raise ConfigError("both --table and --step-profile say how long steps take; give one of them")
    if table is not None:
        costs = CostTable(read_table(table), cluster.device, cluster.efficiency)
        return {model.name: costs.profile(model, names[0]) for model, names in formats.items()}
    return {} if step_profile is None else _saved_timers(step_profile, formats)


def _saved_timers(path: Path, formats: Formats) -> dict[str, StepTimer]:
    profiles = load_profiles(path)
    missing = [model.name for model in formats if model.name not in profiles and model.shape.name not in profiles]
    if missing:
        raise ConfigError(f"{path} has no profile of {', '.join(missing)}; it has {', '.join(profiles)}")
    return {model.name: profiles.get(model.name) or profiles[model.shape.name] for model in formats}


def _bytes(text: str) -> float:
    try:
        return float(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        raise ConfigError(f"kv_memory={text!r} is not a size; give one such as 20GB or 512MiB") from None


def _show(results: list[Result]) -> None:
    columns = [column for column in COLUMNS if column[0] in SHOWN]
    shown = Table("system", "requests/s", *(name for name, _, _ in columns))
    for result in results:
        figures = (value(result.summary) for _, value, _ in columns)
        cells = ("" if f is None else format(f, c[2]) for f, c in zip(figures, columns, strict=True))
        shown.add_row(result.system, f"{result.rate:.2f}", *cells)
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console.width = 140
    console.print(shown)


def _write(report: ReportFlags, results: list[Result], title: str) -> None:
    if report.html is not None:
        write_report(report.html, results, title)
    if report.perfetto is not None:
        write_trace(report.perfetto, results[-1].run, results[-1].system)
    if report.json_output is not None:
        rows = [{"system": r.system, "rate_scale": r.rate_scale, "rate": r.rate} | r.summary.to_dict() for r in results]
        report.json_output.write_text(json.dumps(rows, indent=1) + "\n")
