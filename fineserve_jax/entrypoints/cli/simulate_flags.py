"""The flags of `fineserve-jax simulate`, by what they are about."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from fineserve_jax.entrypoints.cli.flag_types import Switch

Words = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
Numbers = Annotated[tuple[float, ...], tyro.conf.UseAppendAction]


@dataclass(frozen=True)
class WorkloadFlags:
    """Who asks what, and when.

    Attributes:
        mix: MODEL[@WEIGHTS]/KV_FORMAT[=SHARE], repeatable; requests are dealt out in these shares.
        trace: CSV with Azure's columns (TIMESTAMP, ContextTokens, GeneratedTokens), or JSON lines. Without it,
            arrivals are drawn.
        rate: drawn requests a second.
        seconds: how long they keep coming.
        burstiness: coefficient of variation of their gaps; 1 is Poisson.
        rate_scale: factor on the rate, repeatable for curves.
        seed: of everything that is drawn.
        ttft_slo_s: target for the first token; 0 or inf for none.
        tpot_slo_s: target for each further token; 0 for none.
    """

    mix: Words = ()
    trace: Path | None = None
    rate: float = 8.0
    seconds: float = 300.0
    burstiness: float = 1.0
    rate_scale: Numbers = ()
    seed: int = 0
    ttft_slo_s: float | None = 1.0
    tpot_slo_s: float | None = 0.1


@dataclass(frozen=True)
class ServingFlags:
    """What serves it.

    Attributes:
        device: h100, h200, a100, l4, v5e or v6e.
        tp: devices that share each layer.
        kv_memory: size such as 20GB; what the weights leave if not given.
        system: fineserve, uniform, static, prism or paper; repeatable.
        policy: order of admission instead of the system's own; module:function for one of yours.
        max_batch_size: most requests in memory.
        max_chunk_tokens: most prefill tokens of a step.
        prefix_cache: share pages between requests that begin alike (JSON lines with `prefix`).
    """

    device: str = "h100"
    tp: int = 1
    kv_memory: str | None = None
    system: Words = ()
    policy: str | None = None
    max_batch_size: int = 256
    max_chunk_tokens: int = 2048
    prefix_cache: Switch = False


@dataclass(frozen=True)
class StepTimeFlags:
    """How long steps take.

    Attributes:
        layer_overhead_us: microseconds in which the host launches a layer's kernels; the roofline takes at least as
            long. About 330 for an engine that launches one by one; 0 for one that replays recorded graphs, to whose
            steps a millisecond is added.
        table: measured latencies in the form of FineServe's published tables.
        step_profile: JSON of an engine's learnt step times.
    """

    layer_overhead_us: float = 0.0
    table: Path | None = None
    step_profile: Path | None = None


@dataclass(frozen=True)
class ReportFlags:
    """What to write.

    Attributes:
        html: write a report that opens offline.
        perfetto: write a trace of the last run for ui.perfetto.dev.
        json_output: write all figures.
    """

    html: Path | None = None
    perfetto: Path | None = None
    json_output: Annotated[Path | None, tyro.conf.arg(name="json")] = None
