"""Quotas: shares of the memory that tenants, KV precisions or models are guaranteed, and that they may take at most.

A request counts against the quota of its tenant, of its KV precision and of its model, where there are such:

    "tenant:alice"      what requests of the tenant alice hold, whatever their precision
    "precision:int8"    what requests that asked for int8 hold, of whatever tenant
    "model:fast"        what requests of the model fast hold

with all pages that it holds, its residual page and pages that it shares with others included. Fractions are of the
memory that any mix of pages can fill: the ends of slabs that no whole page fits, and one slab a page length that may be
part empty, are left out, so that guarantees which add up to 1 can all be met at once.
"""

import math
from collections.abc import Collection, Mapping
from typing import Self

from pydantic import Field, model_validator

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.errors import IntegrityError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import Request
from fineserve_jax.validation import Validated

KINDS = ("tenant", "precision", "model")


class Quota(Validated):
    """Fractions of the memory.

    Attributes:
        guaranteed: available whenever its owner wants it; others may use it meanwhile.
        max: never exceeded.

    Raises:
        ConfigError: a value out of range, or a guarantee above the maximum.
    """

    guaranteed: float = Field(default=0.0, ge=0.0, le=1.0)
    max: float = Field(default=1.0, gt=0.0, le=1.0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.guaranteed > self.max:
            raise ValueError(f"guaranteed={self.guaranteed} is more than max={self.max}; raise max, or guarantee less")
        return self


def check_quotas(quotas: Mapping[str, Quota], formats: Collection[str]) -> None:
    """Check names and sums.

    Raises:
        ConfigError: a name of no tenant or precision, a precision that is not served, or guarantees over 1 in all.
    """
    for name in quotas:
        kind, _, of = name.partition(":")
        if kind not in KINDS or not of:
            raise ConfigError(
                f"a quota is called {name!r}; call it 'tenant:NAME', 'precision:KV_FORMAT' or 'model:NAME'"
            )
        if kind == "precision" and of not in formats:
            raise ConfigError(
                f"there is a quota for {name!r}, which is not served; the formats are: {', '.join(formats)}"
            )
    total = math.fsum(quota.guaranteed for quota in quotas.values())
    if total > 1 + 1e-9:
        raise ConfigError(f"guaranteed shares add up to {total:g}; those of all quotas together may be 1")


class QuotaAccount:
    """Units of the arena that each quota's requests hold.

    Args:
        kv: what requests hold. Call `note` whenever that has changed for a request.
        quotas: by name.

    Attributes:
        used: units held now, by quota.
        num_requests: how many requests hold some, by quota.
        guaranteed, most: units that the quotas come to.

    Raises:
        ConfigError: see `check_quotas`; or memory too small to divide.
    """

    def __init__(self, kv: KVManager, quotas: Mapping[str, Quota]) -> None:
        self._kv = kv
        check_quotas(quotas, {kv_format for _, kv_format in kv.classes})
        self._quotas = dict(quotas)
        self.most = dict.fromkeys(quotas, 0)
        self.note_classes()
        self.used = dict.fromkeys(quotas, 0)
        self.num_requests = dict.fromkeys(quotas, 0)
        self._charged: dict[Request, int] = {}

    def note_classes(self) -> None:
        """The arena has other classes of pages: what can be filled of it, whatever mix of them there is, has changed.

        A maximum is never lowered, so that what was accepted under it can still be served.

        Raises:
            ConfigError: memory too small to divide; then nothing has changed.
        """
        capacity = _fillable_units(self._kv)
        self.guaranteed = {name: int(quota.guaranteed * capacity) for name, quota in self._quotas.items()}
        self.most = {name: max(self.most[name], int(quota.max * capacity)) for name, quota in self._quotas.items()}

    def names(self, request: Request) -> list[str]:
        """Quotas that the request counts against."""
        return self.names_of(request.options.tenant, request.kv_precision, request.model)

    def names_of(self, tenant: str, kv_precision: str, model: str) -> list[str]:
        """Quotas that requests of the tenant in the precision for the model count against."""
        names = (f"tenant:{tenant}", f"precision:{kv_precision}", f"model:{model}")
        return [name for name in names if name in self.used]

    def note(self, request: Request) -> None:
        """Charge the request for what it holds now."""
        units = self._held_units(request)
        before = self._charged.get(request, 0)
        for name in self.names(request):
            self.used[name] += units - before
            self.num_requests[name] += bool(units) - bool(before)
        if units:
            self._charged[request] = units
        else:
            self._charged.pop(request, None)

    def units(self, model: str, kv_precision: str, num_tokens: int) -> int:
        """Most units that a request takes until so many of its tokens are computed."""
        page_class = self._kv.class_of(model, kv_precision)
        page_units = self._kv.page_units
        return sum(page_units(owner) * count for owner, count in page_class.demand(num_tokens).items())

    def over(self, request: Request, more_units: int) -> str | None:
        """A quota whose maximum would be exceeded if the request held so much more; None if none would."""
        return next((n for n in self.names(request) if self.used[n] + more_units > self.most[n]), None)

    def is_under_guarantee(self, request: Request, more_units: int) -> bool:
        """Whether so much more for the request lies within a guarantee."""
        return any(self.used[name] + more_units <= self.guaranteed[name] for name in self.names(request))

    def is_preemptible(self, request: Request) -> bool:
        """Whether what the request holds may be reclaimed: not while one of its quotas holds no more than it is
        guaranteed."""
        return not any(0 < self.used[name] <= self.guaranteed[name] for name in self.names(request))

    def check(self) -> None:
        """Raises IntegrityError unless `used` is what requests hold."""
        held = dict.fromkeys(self.used, 0)
        for request in self._kv.requests:
            for name in self.names(request):
                held[name] += self._held_units(request)
        if held != self.used:
            raise IntegrityError(f"units by quota: {self.used} in the books, {held} counted")

    def _held_units(self, request: Request) -> int:
        held, page_units = self._kv.holds(request), self._kv.page_units
        units = 0
        for group in held.groups:
            units += sum(len(run.handles) * page_units(run.page_class) for run in group.runs)
            if group.residual is not None and group.page_class.residual is not None:
                units += page_units(group.page_class.residual)
        return units


def _fillable_units(kv: KVManager) -> int:
    """Units that pages can take together, whatever classes they are of."""
    allocator = kv.pool.allocator
    pools = allocator.pools.values()
    filled = min((pool.capacity * pool.page_units for pool in pools), default=allocator.slab_units)
    slabs = allocator.usable_slabs - len(pools)
    if slabs < 1:
        raise ConfigError(
            f"quotas cannot divide an arena of {allocator.usable_slabs} slabs among {len(pools)} lengths of page; "
            "raise kv_memory, or name fewer kv_formats"
        )
    return slabs * filled
