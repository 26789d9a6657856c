"""Compaction: live pages are moved together, so that slabs become free for other classes.

    before   |p . p . .|p p . p p|          after   |free     |p p p p p|

The pages of the slab that costs least to empty go to the fullest other slabs of its pool. Their handles stay; the
device copies what they hold before the next step.
"""

from typing import TYPE_CHECKING

import numpy as np

from fineserve_jax.kv.pool import SlabPool

if TYPE_CHECKING:
    from fineserve_jax.kv.manager import KVManager

MAX_STEP_BYTES = 64 * 2**20


class Compaction:
    """Moves pages of a KV manager.

    Attributes:
        max_step_bytes: most bytes moved between two steps, unless a request would lose its pages otherwise.
        num_pages: pages moved since the start.
        is_cut_short: whether more would have been moved in this step.
    """

    def __init__(self, kv: "KVManager") -> None:
        self._kv = kv
        self.max_step_bytes = MAX_STEP_BYTES
        self.num_pages = 0
        self.is_cut_short = False
        self._moved_bytes = 0

    def begin_step(self) -> None:
        """Another step's worth of bytes may be moved."""
        self._moved_bytes = 0
        self.is_cut_short = False

    def move(self, at_once: bool = False) -> bool:
        """Move pages out of one slab; False if no slab can be freed so, or no more may be moved in this step.

        Args:
            at_once: move all of the slab's pages, however much was moved in this step.
        """
        pool = self._cheapest()
        if pool is None:
            return False
        page_bytes = pool.page_units * self._kv.allocator.unit_bytes
        most = pool.capacity if at_once else (self.max_step_bytes - self._moved_bytes) // page_bytes
        if most < 1:
            self.is_cut_short = True
            return False
        slab = pool.emptiest
        handles = self._handles_in(slab)
        for tag, source, target in self._kv.allocator.move_pages(pool, slab, most):
            page_class = self._kv.allocator.by_tag[tag].page_class
            self._kv.table.units[handles[source]] = target
            self._kv.copy_units(source, target, page_class)
            self._moved_bytes += page_bytes
            self.num_pages += 1
        return True

    def _cheapest(self) -> SlabPool | None:
        """The pool in which freeing a slab moves the fewest bytes."""
        pools = [pool for pool in self._kv.allocator.pools.values() if pool.free_pages >= pool.capacity]
        free = self._kv.allocator.slab_free
        costs = [(pool.capacity - free[pool.emptiest]) * pool.page_units for pool in pools]
        return pools[int(np.argmin(costs))] if pools else None

    def _handles_in(self, slab: int) -> dict[int, int]:
        """First unit -> handle of the pages that lie in a slab."""
        first = slab * self._kv.allocator.slab_units
        units = np.frombuffer(self._kv.table.units, np.int32)
        handles = np.flatnonzero((units >= first) & (units < first + self._kv.allocator.slab_units))
        return dict(zip(units[handles].tolist(), handles.tolist(), strict=True))
