"""The rules by which others place models, as this project reads them: one replica each, of the least degree that fits.

Both take models by urgency, rate over target. `prism` (arXiv 2505.04021) puts each where the largest urgency per free
byte of KV memory over all devices stays least. `slab_aware` (FineServe, arXiv 2509.06261) first looks for the devices
on which the least common multiple of the page lengths stays shortest, and among those does the same.
"""

import math
from collections.abc import Callable

from fineserve_jax.errors import ConfigError
from fineserve_jax.sim.models import page_classes
from fineserve_jax.sim.placement.estimate import PAGE_SIZE, Estimate, estimate, replica_demand
from fineserve_jax.sim.placement.problem import Placement, Problem, Replica
from fineserve_jax.sim.placement.search import groups

Cost = Callable[[Problem, Placement], tuple[float, ...]]


def prism(problem: Problem) -> tuple[Placement, Estimate]:
    """Least largest urgency per free KV byte. Raises ConfigError if a model finds no room."""
    return _by_rule(problem, _pressure)


def slab_aware(problem: Problem) -> tuple[Placement, Estimate]:
    """Shortest common slabs first, then as `prism`. Raises ConfigError if a model finds no room."""

    def cost(problem: Problem, placement: Placement) -> tuple[float, ...]:
        return (_slab_units(problem, placement), *_pressure(problem, placement))

    return _by_rule(problem, cost)


def _by_rule(problem: Problem, cost: Cost) -> tuple[Placement, Estimate]:
    placement: Placement = ()
    for model in sorted(range(len(problem.models)), key=lambda m: -problem.models[m].urgency):
        candidates = [(*placement, Replica(model, group)) for group in groups(problem, model)]
        fitting = [candidate for candidate in candidates if min(_free_bytes(problem, candidate)) > 0]
        if not fitting:
            raise ConfigError(f"{problem.models[model].model} finds no room beside the models placed before it")
        least_tp = min(len(candidate[-1].devices) for candidate in fitting)
        fitting = [candidate for candidate in fitting if len(candidate[-1].devices) == least_tp]
        placement = min(fitting, key=lambda candidate: cost(problem, candidate))
    found = estimate(problem, placement)
    assert found is not None, "each model was placed where its weights fit"
    return placement, found


def _free_bytes(problem: Problem, placement: Placement) -> list[float]:
    free = [device.memory_bytes * (1 - problem.reserve) for device in problem.devices]
    for replica in placement:
        for number in replica.devices:
            asks = replica_demand(problem.models[replica.model], problem.devices[number], len(replica.devices))
            free[number] -= asks.weight_bytes
    return free


def _pressure(problem: Problem, placement: Placement) -> tuple[float, ...]:
    """Urgency per free byte of each device, the largest first, so that ties are broken by the next."""
    urgency = [0.0] * len(problem.devices)
    for replica in placement:
        for number in replica.devices:
            urgency[number] += problem.models[replica.model].urgency
    pressures = (u / free for u, free in zip(urgency, _free_bytes(problem, placement), strict=True))
    return tuple(sorted(pressures, reverse=True))


def _slab_units(problem: Problem, placement: Placement) -> float:
    """The longest common slab of any device, its pages without scales."""
    longest = 0
    for number in range(len(problem.devices)):
        lengths = []
        for replica in placement:
            if number in replica.devices:
                load = problem.models[replica.model]
                classes = page_classes({load.variant(1): [load.kv_precision]}, PAGE_SIZE, bare=True)
                lengths += [page_class.page_units for page_class in classes.values()]
        longest = max(longest, math.lcm(*lengths) if lengths else 0)
    return float(longest)
