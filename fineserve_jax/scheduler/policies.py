"""Orders of the waiting queue. A policy maps a request to a sort key; the smallest key is admitted first.

A key is computed once, when the request begins to wait, so it must not depend on the time of asking. Ageing fits in
nevertheless: if each request's key fell by the same amount per second waited, then any two keys would keep their
order, so the fall can be replaced by a constant, the arrival time: `cost - (now - arrival) ~ cost + arrival`. Hence a
heap does, and adding or admitting one of n waiting requests costs O(log n).

A researcher's own policy is one function and one line:

    POLICIES["longest_first"] = lambda request, context: -request.num_prompt_tokens

or no line at all: `policy="my_module:longest_first"` names a function wherever it is, and a package may offer
policies by name in the entry point group `fineserve_jax.policies`.
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from fineserve_jax.errors import ConfigError
from fineserve_jax.request.request import Request
from fineserve_jax.scheduler.costs import ModelCost
from fineserve_jax.scheduler.tenants import FairShares

SortKey: TypeAlias = Any
"""Whatever compares: a number or a tuple; of one type within a policy. Ties go to the earlier arrival."""

HALF_WEIGHT_TOKENS = 1024
"""Work at which a request is half as far back among those of its format as endless work would put it."""


@dataclass(frozen=True, slots=True)
class PolicyContext:
    """What a policy may know besides the request.

    Attributes:
        ageing_s: `SchedulerConfig.ageing_s`.
        bit_levels: (model, KV format) -> its place among all formats when ordered by bits, 0 for the fewest.
        num_levels: how many such places there are.
        expected_output_tokens: estimate of a request's output length.
        prefill_s: predicted seconds until a request's first token, were it computed at once.
        shares: tenants' shares of the memory.
    """

    ageing_s: float
    bit_levels: Mapping[tuple[str, str], int]
    num_levels: int
    expected_output_tokens: Callable[[Request], float]
    prefill_s: Callable[[Request], float]
    shares: FairShares

    def for_models(self, models: Mapping[str, ModelCost]) -> "PolicyContext":
        """The same, of these models."""
        levels = _bit_levels(models)
        return replace(self, bit_levels=levels, num_levels=len(set(levels.values())))


Policy: TypeAlias = Callable[[Request, PolicyContext], SortKey]


def fineserve(request: Request, context: PolicyContext) -> SortKey:
    """Fewer KV bits first, then less expected work, with ageing.

    The key is `arrival_s + ageing_s * penalty`, in seconds. `penalty` lies in [0, 1): level by bits first,
    and within a level it grows with the work, w / (w + 1024), so that among requests that arrived together
    the order is exactly (bits, work).

    Bound on waiting: since 0 <= penalty < 1, a request that arrives `ageing_s` or more after this one has a
    larger key. So only requests that arrived before `arrival_s + ageing_s` can ever precede this one, and it
    waits at most `ageing_s` plus the time in which the engine serves those. `admission` keeps the bound when
    memory is short.
    """
    work = expected_work(request, context)
    level = context.bit_levels[request.model, request.kv_precision]
    penalty = (level + work / (work + HALF_WEIGHT_TOKENS)) / context.num_levels
    return request.times.arrival_s + context.ageing_s * penalty


def fcfs(request: Request, context: PolicyContext) -> SortKey:
    """First come, first served."""
    return request.times.arrival_s


def sjf(request: Request, context: PolicyContext) -> SortKey:
    """Least expected work first; a long request may wait for ever while shorter ones keep coming."""
    return expected_work(request, context)


def edf(request: Request, context: PolicyContext) -> SortKey:
    """Earliest deadline first: the target for the first token, or else `deadline_s`; without either it is `ageing_s`
    after arrival."""
    options = request.options
    return request.times.arrival_s + (options.ttft_slo_s or options.deadline_s or context.ageing_s)


def least_slack(request: Request, context: PolicyContext) -> SortKey:
    """Least time to spare first, when the first token is to be in time; deadlines as in `edf`."""
    return edf(request, context) - context.prefill_s(request)


def tenants(request: Request, context: PolicyContext) -> SortKey:
    """Tenants in proportion to their weights, and each tenant's requests as they came."""
    return context.shares.tag(request.options.tenant, expected_work(request, context))


def expected_work(request: Request, context: PolicyContext) -> float:
    """Tokens of prompt and expected output."""
    return request.num_prompt_tokens + context.expected_output_tokens(request)


def policy_context(
    ageing_s: float,
    models: Mapping[str, ModelCost],
    expected_output_tokens: Callable[[Request], float],
    prefill_s: Callable[[Request], float],
    tenant_weights: Mapping[str, float] | None,
) -> PolicyContext:
    """What policies may know of these models; further arguments as in `PolicyContext`, and weights by tenant."""
    levels = _bit_levels(models)
    num_levels = len(set(levels.values()))
    return PolicyContext(ageing_s, levels, num_levels, expected_output_tokens, prefill_s, FairShares(tenant_weights))


def _bit_levels(models: Mapping[str, ModelCost]) -> dict[tuple[str, str], int]:
    """See `PolicyContext.bit_levels`."""
    bits = {(model, name): cost.bits for model, costs in models.items() for name, cost in costs.formats.items()}
    levels = {value: level for level, value in enumerate(sorted(set(bits.values())))}
    return {pair: levels[value] for pair, value in bits.items()}


POLICIES: dict[str, Policy] = {
    "fineserve": fineserve,
    "fcfs": fcfs,
    "sjf": sjf,
    "edf": edf,
    "least_slack": least_slack,
    "tenants": tenants,
}
ENTRY_POINTS = "fineserve_jax.policies"


def find_policy(name: str) -> Policy:
    """The policy of that name: one of `POLICIES`, `module:function`, or an installed package's entry point.

    Raises:
        ConfigError: a name that nothing bears, or that does not stand for a function.
    """
    if name in POLICIES:
        return POLICIES[name]
    if ":" in name:
        module, _, function = name.partition(":")
        try:
            policy = getattr(importlib.import_module(module), function)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"policy {name!r} cannot be imported: {error}") from None
    else:
        found = list(importlib.metadata.entry_points(group=ENTRY_POINTS, name=name))
        if not found:
            raise ConfigError(
                f"unknown policy; the policies are: {', '.join(POLICIES)}; or name a function as module:function"
            )
        policy = found[0].load()
    if not callable(policy):
        raise ConfigError(f"policy {name!r} is {policy!r}, which is no function of a request and a PolicyContext")
    return policy
