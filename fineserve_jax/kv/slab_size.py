"""How long a slab should be, so that pages of very different lengths all fill it nearly to the end."""

from collections.abc import Iterable

import numpy as np

from fineserve_jax.errors import ConfigError

MIN_SLABS_PER_CLASS = 8


def choose_slab_units(page_units: Iterable[int], num_units: int, max_waste: float = 0.01) -> int:
    """The smallest slab length of which every class leaves less than `max_waste` unused at the end.

    The search stops where an arena of `num_units` units would have fewer than 8 slabs a class (and one for
    the null page): then the length with the least waste up to there is taken. An arena too small even for
    that many slabs of the longest page gets slabs of that length.

    Args:
        page_units: units that a page of each class takes.
        num_units: units of the arena.
        max_waste: bound on the wasted fraction of a slab.

    Returns:
        Units a slab.

    Raises:
        ConfigError: no class, a length below 1, or a bound outside 0 to 1.
    """
    lengths = list(page_units)
    if not lengths or min(lengths) < 1:
        raise ConfigError(f"page_units={lengths}: give the units of at least one class, each at least 1")
    if not 0 < max_waste <= 1:
        raise ConfigError(f"max_waste={max_waste}: give a fraction over 0 and at most 1")
    longest = max(lengths)
    limit = num_units // (MIN_SLABS_PER_CLASS * len(lengths) + 1)
    # The unused end is shorter than a page, so no longer slab than this can be the first one good enough.
    limit = min(limit, int(longest / max_waste) + 1)
    best, least_waste = longest, np.inf
    for start in range(longest, limit + 1, 64 * longest):
        slabs = _multiples(lengths, start, min(start + 64 * longest, limit + 1))
        waste = (slabs[:, None] % np.array(lengths)).max(axis=1) / slabs
        good = np.flatnonzero(waste < max_waste)
        if good.size:
            return int(slabs[good[0]])
        if waste.size and waste.min() < least_waste:
            best, least_waste = int(slabs[waste.argmin()]), waste.min()
    return best


def _multiples(lengths: list[int], start: int, stop: int) -> np.ndarray:
    """Multiples of any of the lengths in [start, stop), ascending.

    No other slab length needs a look: made one unit shorter, it loses that unit from every unused end.
    """
    return np.unique(np.concatenate([np.arange(-(-start // n) * n, stop, n) for n in lengths]))
