"""`fineserve-jax simulate`: this engine's scheduler, and others' rules, on devices that need not be there."""

import json
import math
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from fineserve_jax.cli.flag_types import Switch
from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler import load_profiles
from fineserve_jax.sim.cost_table import CostTable, read_table
from fineserve_jax.sim.devices import Device, Efficiency, get_device
from fineserve_jax.sim.experiment import Experiment, Result, check_arrivals, parse_mix, with_targets
from fineserve_jax.sim.models import ServedModel
from fineserve_jax.sim.report import COLUMNS, write_report
from fineserve_jax.sim.simulator import StepTimer
from fineserve_jax.sim.systems import Cluster, get_system
from fineserve_jax.sim.trace_output import write_trace
from fineserve_jax.sim.workload import Arrival, assign, draw, read_csv, read_jsonl

Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Numbers = Annotated[tuple[float, ...], tyro.conf.UseAppendAction]
SHOWN = ("requests", "dropped", "tokens/s", "tokens/s in time", "in time", "TTFT p99, s", "TPOT p99, s", "preemptions")


def simulate(
    *,
    mix: Words = (),
    trace: Path | None = None,
    rate: float = 8.0,
    seconds: float = 300.0,
    burstiness: float = 1.0,
    rate_scale: Numbers = (),
    seed: int = 0,
    device: str = "h100",
    tp: int = 1,
    kv_memory: str | None = None,
    system: Words = (),
    policy: str | None = None,
    ttft_slo_s: float | None = 1.0,
    tpot_slo_s: float | None = 0.1,
    max_batch_size: int = 256,
    max_chunk_tokens: int = 2048,
    prefix_cache: Switch = False,
    layer_overhead_us: float = 0.0,
    table: Path | None = None,
    step_profile: Path | None = None,
    html: Path | None = None,
    perfetto: Path | None = None,
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None,
) -> None:
    """Replay a workload on a virtual clock, at the scale of devices that need not be there.

    Scheduler, memory pools and policies are the engine's own; steps take as long as a cost model says: the
    device's roofline, a table of measured latencies (--table), or a step profile that an engine has saved
    (--step-profile). The same seed gives the same results to the byte.

    Args:
        mix: MODEL[@WEIGHTS]/KV_FORMAT[=SHARE], repeatable; requests are dealt out in these shares.
        trace: CSV with Azure's columns (TIMESTAMP, ContextTokens, GeneratedTokens), or JSON lines. Without it,
            arrivals are drawn.
        rate: drawn requests a second.
        seconds: how long they keep coming.
        burstiness: coefficient of variation of their gaps; 1 is Poisson.
        rate_scale: factor on the rate, repeatable for curves.
        seed: of everything that is drawn.
        device: h100, a100, l4, v5e or v6e.
        tp: devices that share each layer.
        kv_memory: size such as 20GB; what the weights leave if not given.
        system: fineserve, uniform, static, prism or paper; repeatable.
        policy: order of admission instead of the system's own; module:function for one of yours.
        ttft_slo_s: target for the first token; 0 for none.
        tpot_slo_s: target for each further token; 0 for none.
        max_batch_size: most requests in memory.
        max_chunk_tokens: most prefill tokens of a step.
        prefix_cache: share pages between requests that begin alike (JSON lines with `prefix`).
        layer_overhead_us: microseconds in which the host launches a layer's kernels; the roofline takes at least as
            long. About 330 for an engine that launches one by one; 0 for one that replays recorded graphs, to whose
            steps a millisecond is added.
        table: measured latencies in the form of FineServe's published tables.
        step_profile: JSON of an engine's learnt step times.
        html: write a report that opens offline.
        perfetto: write a trace of the last run for ui.perfetto.dev.
        json_output: write all figures.
    """
    for option, path in (("html", html), ("perfetto", perfetto), ("json", json_output)):
        check_can_write(option, path)
    kinds, formats = parse_mix(mix or ("llama-3.1-8b/bf16", "llama-3.1-8b/int8", "llama-3.1-8b/int4"), tp)
    systems = [get_system(name) for name in system or ("fineserve", "uniform")]
    arrivals = _arrivals(trace, rate, seconds, burstiness, seed)
    arrivals = assign(arrivals, with_targets(kinds, ttft_slo_s or None, tpot_slo_s or None), seed)
    if not arrivals:
        raise ConfigError("the workload is empty: no request arrives; give a longer --seconds or a higher --rate")
    chip = get_device(device)
    cluster = Cluster(
        chip,
        tuple(formats),
        {model.name: names for model, names in formats.items()},
        None if kv_memory is None else _bytes(kv_memory),
        efficiency=_efficiency(layer_overhead_us, measured=table is not None or step_profile is not None),
        prefix_cache="exact" if prefix_cache else "off",
    )
    check_arrivals(arrivals, cluster)
    settings: dict[str, object] = {"max_batch_size": max_batch_size, "max_chunk_tokens": max_chunk_tokens}
    if policy is not None:
        settings["policy"] = policy
    timers = _timers(formats, chip, cluster.efficiency, table, step_profile)
    experiment = Experiment(arrivals, cluster, timers, settings)
    scales = sorted(rate_scale) or [1.0]
    results = experiment.run_all(systems, scales, record_steps=perfetto is not None)
    _show(results)
    title = f"{len(arrivals)} requests on {tp} x {device}"
    if html is not None:
        write_report(html, results, title)
    if perfetto is not None:
        write_trace(perfetto, results[-1].run, results[-1].system)
    if json_output is not None:
        rows = [{"system": r.system, "rate_scale": r.rate_scale, "rate": r.rate} | r.summary.to_dict() for r in results]
        json_output.write_text(json.dumps(rows, indent=1) + "\n")


def _arrivals(trace: Path | None, rate: float, seconds: float, burstiness: float, seed: int) -> list[Arrival]:
    if trace is None:
        return draw(rate, seconds, seed, burstiness=burstiness)
    return read_csv(trace) if trace.suffix == ".csv" else read_jsonl(trace)


def _efficiency(layer_overhead_us: float, measured: bool) -> Efficiency:
    if not 0 <= layer_overhead_us < math.inf:
        raise ConfigError(f"layer_overhead_us={layer_overhead_us:g} is no time; give 0 or more microseconds")
    if layer_overhead_us and measured:
        raise ConfigError("--table and --step-profile are measured, launches included; leave out --layer-overhead-us")
    if not layer_overhead_us:
        return Efficiency()
    return Efficiency(step_overhead_s=0.0, layer_overhead_s=layer_overhead_us * 1e-6)


def _timers(
    formats: dict[ServedModel, tuple[str, ...]],
    device: Device,
    efficiency: Efficiency,
    table: Path | None,
    step_profile: Path | None,
) -> dict[str, StepTimer]:
    """The cost models that the user gave: by model name, or for a lone profile whatever the model."""
    if table is not None and step_profile is not None:
        raise ConfigError("both --table and --step-profile say how long steps take; give one of them")
    if table is not None:
        costs = CostTable(read_table(table), device, efficiency)
        return {model.name: costs.profile(model, names[0]) for model, names in formats.items()}
    if step_profile is None:
        return {}
    profiles = load_profiles(step_profile)
    missing = [model.name for model in formats if model.name not in profiles and model.shape.name not in profiles]
    if missing:
        raise ConfigError(f"{step_profile} has no profile of {', '.join(missing)}; it has {', '.join(profiles)}")
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
