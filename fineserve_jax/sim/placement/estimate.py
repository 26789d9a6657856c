"""What a placement would give, by queueing formulas: quick enough to be asked thousands of times.

A device is busy with three things. Each model's rows need a step every `tpot_slo_s`, which reads the weights however
few they are; each prompt has to be computed; and each further token adds its own operations and its reading of the
cache. Their sum is the device's load rho. While it is under 1, a request waits longer than t with the probability
rho exp(-(1 - rho) t / s) of a queue whose busy periods are s long at a time (M/M/1; here s is the mean prefill); over
1, the share 1 / rho of all requests is served. Memory is short if the requests that are under way at once (Little's
law) need more cache than there is; then only that share can be.

These are estimates to choose by. `fineserve-jax simulate` tells what a choice is worth.
"""

import functools
import math
from dataclasses import dataclass

from fineserve_jax.scheduler.costs import StepCost
from fineserve_jax.scheduler.devices import DeviceSpec
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.sim.efficiency import Efficiency
from fineserve_jax.sim.placement.problem import ModelLoad, Placement, Problem

PAGE_SIZE = 16
EFFICIENCY = Efficiency()


@dataclass(frozen=True)
class Estimate:
    """What to expect of a placement.

    Attributes:
        in_time_per_s: requests a second within their targets, of all models: what is maximised.
        in_time: the same as a share of all requests.
        attainment: share of each model's requests within its targets.
        load: of each device; over 1 it cannot keep up.
        arena_bytes: KV memory of each device.
        arena_shares: for each device, model number -> share of that memory that its requests will need.
    """

    in_time_per_s: float
    in_time: float
    attainment: tuple[float, ...]
    load: tuple[float, ...]
    arena_bytes: tuple[float, ...]
    arena_shares: tuple[dict[int, float], ...]

    @property
    def score(self) -> tuple[float, float]:
        """Larger is better: requests in time, to a thousandth, and among equals the lightest load on the busiest
        device."""
        return (round(self.in_time, 3), -round(max(self.load, default=0.0), 9))


@dataclass(frozen=True)
class ReplicaDemand:
    """What a model asks of one of its devices, for each request a second: seconds of work and bytes of cache; and
    besides, whatever the rate, `pace` of the device's time and the weights. `prefill_s` is a request's alone."""

    work_s: float
    pace: float
    prefill_s: float
    kv_bytes: float
    weight_bytes: float
    step_s: float


@functools.cache
def replica_demand(load: ModelLoad, device: DeviceSpec, tp: int) -> ReplicaDemand:
    """What a replica of a model asks of each of its `tp` devices."""
    variant = load.variant(tp)
    cost = variant.cost([load.kv_precision], PAGE_SIZE)
    profile = StepProfile(cost, variant.roofline(device, EFFICIENCY))
    prompt, output = load.prompt_tokens, load.output_tokens
    cached = cost.formats[load.kv_precision].bytes_per_token
    context_bytes = (prompt + output / 2) * cached
    empty_s = profile.predict(StepCost(0, 0, 0.0))
    prefill_s = profile.predict(StepCost(int(prompt), int(prompt * (prompt + 1) / 2), 0.0))
    # A token beyond the knee costs its operations; before it, it rides on the reading of the weights.
    token_s = cost.flops_per_token / profile.roofline.flops + context_bytes / profile.roofline.bandwidth
    return ReplicaDemand(
        work_s=max(prefill_s - empty_s, prompt * cost.flops_per_token / profile.roofline.flops) + output * token_s,
        pace=empty_s / load.tpot_slo_s,
        prefill_s=prefill_s,
        kv_bytes=output * load.tpot_slo_s * context_bytes / tp,
        weight_bytes=variant.weight_bytes / tp,
        step_s=empty_s + token_s,
    )


def estimate(problem: Problem, placement: Placement) -> Estimate | None:
    """What to expect; None if the weights do not fit, or a model has no replica."""
    num_devices, num_models = len(problem.devices), len(problem.models)
    num_replicas = [0] * num_models
    for replica in placement:
        num_replicas[replica.model] += 1
    free = [device.memory_bytes * (1 - problem.reserve) for device in problem.devices]
    load, wanted = [0.0] * num_devices, [dict[int, float]() for _ in range(num_devices)]
    for replica in placement:
        model = problem.models[replica.model]
        asks = replica_demand(model, problem.devices[replica.devices[0]], len(replica.devices))
        rate = model.rate / num_replicas[replica.model]
        active = 1 - math.exp(-rate * model.output_tokens * model.tpot_slo_s)  # that a row is there at all
        for number in replica.devices:
            free[number] -= asks.weight_bytes
            load[number] += asks.pace * active + rate * asks.work_s
            wanted[number][replica.model] = rate * asks.kv_bytes
    if min(num_replicas, default=0) == 0 or min(free) <= 0:
        return None
    attainment = _attainment(problem, placement, num_replicas, load, free, wanted)
    in_time_per_s = sum(a * model.rate for a, model in zip(attainment, problem.models, strict=True))
    return Estimate(
        in_time_per_s=in_time_per_s,
        in_time=in_time_per_s / sum(model.rate for model in problem.models),
        attainment=tuple(attainment),
        load=tuple(load),
        arena_bytes=tuple(free),
        arena_shares=tuple({m: b / sum(models.values()) for m, b in models.items()} for models in wanted),
    )


def _attainment(
    problem: Problem,
    placement: Placement,
    num_replicas: list[int],
    load: list[float],
    free: list[float],
    wanted: list[dict[int, float]],
) -> list[float]:
    attainment = [0.0] * len(problem.models)
    for replica in placement:
        model = problem.models[replica.model]
        asks = replica_demand(model, problem.devices[replica.devices[0]], len(replica.devices))
        busiest = max(load[number] for number in replica.devices)
        memory = min(1.0, *(free[number] / sum(wanted[number].values()) for number in replica.devices))
        spare_s = model.ttft_slo_s - asks.prefill_s
        if spare_s <= 0 or asks.step_s > model.tpot_slo_s:
            share = 0.0
        elif busiest >= 1:
            share = 1 / busiest * (1 - math.exp(-1.0))  # it is served, but not always in time
        else:
            share = 1 - busiest * math.exp(-(1 - busiest) * spare_s / asks.prefill_s)
            share = max(share, 1 - math.exp(-1.0))
        attainment[replica.model] += share * memory / num_replicas[replica.model]
    return attainment
