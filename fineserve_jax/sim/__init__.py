"""What can be said without a device: the engine on a virtual clock, and which model should go on which devices.

In a simulation, scheduler, memory pools and policies are the engine's own; a cost model takes the runner's place.

    workload, traces   who asks what, and when: drawn, or read from a file
    models             models by their shapes: what a step costs, how long KV pages are
    efficiency         what of a device's peaks (`scheduler.devices`) is reached
    cost_table         cost models from tables of measured latencies
    systems            what is compared: this engine, and others' rules
    simulator          the loop; gives a `records.Run`
    experiment         several systems at several rates
    metrics            a run's figures: TTFT, TPOT, goodput, SLO attainment
    report, charts     runs side by side as an HTML page
    trace_output       a run as a trace for Perfetto
    placement/         which model goes on which devices

Host only: nothing here imports JAX.
"""

from fineserve_jax.scheduler.devices import DEVICES, DeviceSpec, get_device
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.metrics import Summary, summarize
from fineserve_jax.sim.models import ModelVariant, parse_model
from fineserve_jax.sim.records import RequestRecord, Run
from fineserve_jax.sim.simulator import Simulator
from fineserve_jax.sim.systems import SYSTEMS, Cluster, System, build, get_system, prepare
from fineserve_jax.sim.traces import read_csv, read_jsonl
from fineserve_jax.sim.workload import Arrival, Kind, assign, draw, scale_rate

__all__ = [
    "DEVICES",
    "SYSTEMS",
    "Arrival",
    "Cluster",
    "DeviceSpec",
    "Efficiency",
    "Kind",
    "ModelVariant",
    "RequestRecord",
    "Run",
    "Simulator",
    "Summary",
    "System",
    "assign",
    "build",
    "draw",
    "get_device",
    "get_system",
    "parse_model",
    "prepare",
    "read_csv",
    "read_jsonl",
    "scale_rate",
    "summarize",
]
