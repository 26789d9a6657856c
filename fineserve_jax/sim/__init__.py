"""The engine on a virtual clock: its scheduler, pools and policies, with a cost model in place of the runner.

    workload     who asks what, and when                 devices, models   accelerators and models as figures
    cost_table   cost models from measured tables        systems           this engine, and others' rules
    simulator    the loop                                metrics, trace_output, report   what came out of it

No jax, no device.
"""

from fineserve_jax.scheduler.devices import DEVICES, DeviceSpec, get_device
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.metrics import Summary, summarize
from fineserve_jax.sim.models import ServedModel, parse_model
from fineserve_jax.sim.simulator import Run, Served, Simulator
from fineserve_jax.sim.systems import SYSTEMS, Cluster, System, build, get_system, prepare
from fineserve_jax.sim.workload import Arrival, Kind, assign, draw, read_csv, read_jsonl, scale_rate

__all__ = [
    "DEVICES",
    "SYSTEMS",
    "Arrival",
    "Cluster",
    "DeviceSpec",
    "Efficiency",
    "Kind",
    "Run",
    "Served",
    "ServedModel",
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
