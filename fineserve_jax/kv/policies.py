"""Who may use which slab: the three ways to divide an arena, behind one small interface.

A policy answers two questions. Which classes draw pages from the same *pool* of slabs (a pool's pages are all
as long as its longest class's)? And which *share* of the arena's slabs does a class count against?
"""

import math
from collections.abc import Collection, Mapping
from fractions import Fraction
from typing import Protocol

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass


class SlabPolicy(Protocol):
    def pool_name(self, page_class: PageClass) -> tuple[str, ...]:
        """Classes with equal pool names share slabs and page length."""

    def share_name(self, page_class: PageClass) -> str:
        """Classes with equal share names are bounded together."""

    def slab_limits(self, share_names: Collection[str], num_slabs: int) -> dict[str, int]:
        """Most slabs that each share may have bound at a time, of `num_slabs` that can be handed out."""


class Elastic:
    """A pool a class, and any pool may grow into any free slab."""

    def pool_name(self, page_class: PageClass) -> tuple[str, ...]:
        return (page_class.model, page_class.precision_and_group)

    def share_name(self, page_class: PageClass) -> str:
        return "arena"

    def slab_limits(self, share_names: Collection[str], num_slabs: int) -> dict[str, int]:
        return dict.fromkeys(share_names, num_slabs)


class Uniform(Elastic):
    """One pool for all: every page as long as the longest class's, as in engines with a single block size."""

    def pool_name(self, page_class: PageClass) -> tuple[str, ...]:
        return ("every class",)


class Partitioned(Elastic):
    """A pool a class, and a fixed quota of slabs a KV precision.

    Args:
        shares: weight of each format, normalised here; a format without one is refused. None weighs all the
            formats of the arena's classes alike.

    Raises:
        ConfigError: a weight that is not a positive number.
    """

    def __init__(self, shares: Mapping[str, float] | None = None) -> None:
        for kv_format, share in (shares or {}).items():
            if not (share > 0 and math.isfinite(share)):
                raise ConfigError(f"share {kv_format}={share!r}: give a positive number, or leave the format out")
        self.shares = dict(shares) if shares else None

    def share_name(self, page_class: PageClass) -> str:
        return page_class.precision

    def slab_limits(self, share_names: Collection[str], num_slabs: int) -> dict[str, int]:
        shares = self.shares or dict.fromkeys(sorted(share_names), 1.0)
        missing = sorted(set(share_names) - set(shares))
        if missing:
            raise ConfigError(
                f"the partitioned slab policy has shares for {', '.join(sorted(shares))}, none for "
                f"{', '.join(missing)}; add a share for it (an int4 cache also needs its residual page's format)"
            )
        return apportion(num_slabs, shares)


def apportion(total: int, shares: Mapping[str, float]) -> dict[str, int]:
    """Split `total` in proportion to `shares` by largest remainders: the parts add up to it exactly."""
    weight = sum(map(Fraction, shares.values()))
    exact = {name: total * Fraction(share) / weight for name, share in shares.items()}
    parts = {name: math.floor(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: parts[name] - exact[name])
    for name in by_remainder[: total - sum(parts.values())]:
        parts[name] += 1
    return parts


POLICIES: dict[str, type[Elastic]] = {"elastic": Elastic, "partitioned": Partitioned, "uniform": Uniform}


def slab_policy(name: str, shares: Mapping[str, float] | None = None) -> SlabPolicy:
    """The policy of that name.

    Raises:
        ConfigError: an unknown name, or shares for a policy that has none.
    """
    if name not in POLICIES:
        raise ConfigError(f"unknown slab policy {name!r}; the policies are: {', '.join(POLICIES)}")
    if name == "partitioned":
        return Partitioned(shares)
    if shares:
        raise ConfigError(f"slab shares {dict(shares)} with the slab policy {name!r}; only 'partitioned' has shares")
    return POLICIES[name]()
