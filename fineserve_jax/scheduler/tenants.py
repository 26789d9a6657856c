"""Memory shared between tenants by weight: start-time fair queueing (Goyal, Vin and Cheng, SIGCOMM 1996).

Each request gets a tag in a virtual time that counts work over weight: it starts where its tenant's work so far ends,
or now if the tenant had nothing waiting. The smallest tag is admitted first, and virtual time is the tag of the
request admitted last. So tenants that always have requests waiting are admitted work in proportion to their weights,
and one that was away has saved nothing up.
"""

import math
from collections.abc import Mapping

from fineserve_jax.errors import ConfigError


class FairShares:
    """Virtual time, and where each tenant's work ends in it.

    Args:
        weights: by tenant; 1 for those not named.

    Raises:
        ConfigError: a weight that is not a positive number.
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = dict(weights or {})
        for tenant, weight in self._weights.items():
            if not (weight > 0 and math.isfinite(weight)):
                raise ConfigError(f"weight of tenant {tenant!r} is {weight!r}; give a positive number")
        self._ends: dict[str, float] = {}
        self._now = 0.0

    def tag(self, tenant: str, work: float) -> float:
        """Tag of the tenant's next request, which is that much work."""
        start = max(self._now, self._ends.get(tenant, 0.0))
        self._ends[tenant] = start + work / self._weights.get(tenant, 1.0)
        return start

    def admitted(self, tag: float) -> None:
        """Virtual time has come to this tag."""
        self._now = max(self._now, tag)
