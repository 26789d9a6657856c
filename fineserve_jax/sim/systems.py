"""Systems to compare: this engine, and others' rules built from the same parts.

    fineserve   this engine: slabs of any length, fewer bits first with ageing, steps by targets, late requests last
    uniform     one block size for all formats, first come first served (as vLLM, arXiv 2309.06180)
    static      a fixed share of memory for each KV format, first come first served
    prism       blocks on demand in large granules, least slack first (after Prism, arXiv 2505.04021)
    paper       slabs as long as the least common multiple of the pages, late requests dropped (arXiv 2509.06261)

What is another system's is its rules, not its code. All run on the same cost model, which has steps of one model at a
time, and on this engine's pools. These move pages together when memory is short, but not for `prism` and `paper`, whose
slabs are free for another class only when their last page is. All but `paper` keep every request.
"""

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.scheduler import Scheduler, SchedulerConfig, StepProfile
from fineserve_jax.scheduler.devices import DeviceSpec
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.models import UNIT_BYTES, ModelVariant, page_classes
from fineserve_jax.sim.simulator import StepTimer
from fineserve_jax.sim.workload import Arrival, updated

GRANULE_BYTES = 2 * 2**20
"""What virtual memory on a GPU is mapped in; Prism maps this much of K and of V for each layer at a time."""

MAX_CHUNK_TOKENS = 512
"""Most prefill tokens of a step, unless told otherwise."""


@dataclass(frozen=True, slots=True)
class System:
    """How requests are served.

    Attributes:
        name: as users write it.
        policy: order of admission.
        slab_policy: `elastic`, `partitioned` or `uniform`.
        slabs: how long they are: `searched`, `lcm` or `granules`.
        compacts: whether pages are moved together; where pages have one length, or fixed shares, there is no need to.
        drop_late: requests are dropped when their first token cannot come in time.
        settings: further fields of `SchedulerConfig`.
    """

    name: str
    policy: str
    slab_policy: str = "elastic"
    slabs: str = "searched"
    compacts: bool = True
    drop_late: bool = False
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)


# Others admit by their own order only: a request that cannot make it is not told from one that can, and models
# take turns.
PLAIN = {"slo_aware": False, "preemption": "recompute"}
SYSTEMS = {
    system.name: system
    for system in (
        System("fineserve", "fineserve"),
        System("uniform", "fcfs", slab_policy="uniform", settings=PLAIN),
        System("static", "fcfs", slab_policy="partitioned", settings=PLAIN),
        System("prism", "least_slack", slabs="granules", compacts=False, settings=PLAIN),
        System("paper", "fineserve", slabs="lcm", compacts=False, drop_late=True),
    )
}


def get_system(name: str) -> System:
    """The system of that name; raises ConfigError if there is none."""
    try:
        return SYSTEMS[name]
    except KeyError:
        raise ConfigError(f"system={name!r} is not known; choose from {', '.join(SYSTEMS)}") from None


@dataclass(frozen=True, slots=True)
class Cluster:
    """Where models are served: a device, or a tensor-parallel group of them, and what of its memory is for KV.

    Attributes:
        device: its kind.
        models: all that share it.
        kv_formats: KV formats that requests of any model name.
        kv_bytes: memory for KV; None: what the weights and `reserve` leave.
        reserve: share of the device's memory kept for activations.
        efficiency: what of the device's peaks is reached.
        prefix_cache: whether requests that begin alike share pages; see `kv.sharing`.
    """

    device: DeviceSpec
    models: tuple[ModelVariant, ...]
    kv_formats: Mapping[str, tuple[str, ...]]
    kv_bytes: float | None = None
    reserve: float = 0.1
    efficiency: Efficiency = dataclasses.field(default_factory=Efficiency)
    prefix_cache: str = "off"

    @property
    def arena_bytes(self) -> float:
        """Memory for KV. Raises ConfigError if the weights leave none."""
        if self.kv_bytes is not None:
            return self.kv_bytes
        tp = max(model.tp for model in self.models)
        weights = sum(model.weight_bytes for model in self.models)
        left = tp * self.device.memory_bytes * (1 - self.reserve) - weights
        if left <= 0:
            raise ConfigError(
                f"weights of {', '.join(model.name for model in self.models)} take {weights / 1e9:.1f} GB, more than "
                f"{tp} x {self.device.name} has; use narrower weights, a larger tp or fewer models"
            )
        return left


def build(
    system: System,
    cluster: Cluster,
    timers: Mapping[str, StepTimer] | None = None,
    **settings: object,
) -> tuple[Scheduler, KVManager, dict[str, StepTimer]]:
    """The parts of a simulation: the engine's scheduler and KV manager as `system` wants them, and cost models.

    Args:
        timers: cost model of each model by name; rooflines for those without.
        settings: fields of `SchedulerConfig` that beat the system's own.
    """
    given = {"policy": system.policy, "max_chunk_tokens": MAX_CHUNK_TOKENS, **system.settings, **settings}
    config = SchedulerConfig(**given)  # type: ignore[arg-type]
    formats = {model: cluster.kv_formats[model.name] for model in cluster.models}
    # With scales in the pages their least common multiple is gigabytes, and nobody would build that.
    classes = page_classes(formats, config.page_size, bare=system.slabs == "lcm")
    kv = KVManager(
        _allocator(system, cluster, classes), classes, prefix_cache=cluster.prefix_cache, compacts=system.compacts
    )
    costs = {model.name: model.cost(names, config.page_size) for model, names in formats.items()}
    rooflines = {model.name: model.roofline(cluster.device, cluster.efficiency) for model in cluster.models}
    scheduler = Scheduler(config, kv, costs, next(iter(rooflines.values())))
    for name, cost in costs.items():
        scheduler.profiles[name] = StepProfile(cost, rooflines[name])
    truths = {name: (timers or {}).get(name) or StepProfile(costs[name], rooflines[name]) for name in costs}
    return scheduler, kv, truths


def _allocator(system: System, cluster: Cluster, classes: Mapping[tuple[str, str], PageClass]) -> SlabAllocator:
    num_units = int(cluster.arena_bytes // UNIT_BYTES)
    lengths = [page_class.page_units for page_class in classes.values()]
    slab_units = {
        "searched": lambda: choose_slab_units(lengths, num_units),
        "lcm": lambda: math.lcm(*lengths),
        "granules": lambda: max(_granule_units(cluster.models), *lengths),
    }[system.slabs]()
    if num_units < 2 * slab_units:
        raise ConfigError(
            f"{system.name}: a slab takes {slab_units * UNIT_BYTES / 1e9:.2f} GB, the memory for KV has "
            f"{cluster.arena_bytes / 1e9:.2f} GB and must hold two; give more kv_memory"
        )
    return SlabAllocator(num_units, slab_units, system.slab_policy, classes.values(), unit_bytes=UNIT_BYTES)


def _granule_units(models: Iterable[ModelVariant]) -> int:
    return max(2 * model.shape.num_layers for model in models) * GRANULE_BYTES // UNIT_BYTES


def prepare(system: System, arrivals: Iterable[Arrival]) -> list[Arrival]:
    """The arrivals as this system takes them: one that drops late requests does so with all that have a target."""
    if not system.drop_late:
        return list(arrivals)
    dropped = functools.cache(lambda options: updated(options, drop_when_late=options.ttft_slo_s is not None))
    return [dataclasses.replace(arrival, options=dropped(arrival.options)) for arrival in arrivals]
