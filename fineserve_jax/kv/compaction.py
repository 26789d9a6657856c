"""Compaction: live pages are moved together, so that slabs become free for other classes.

    before   |p . p . .|p p . p p|          after   |free     |p p p p p|

The pages of the slab that costs least to empty go to the fullest other slabs of its pool. Their handles stay; the
device copies what they hold before the next step. Pages are moved

    on demand       when a class is short of memory, until a slab is free for it
    between steps   while over 1 in 256 of a pool's pages are free, a little each step, so that hardly any memory
                    lies in slabs that do not use it. As memory is wanted less, a page is moved about once for each
                    page freed; a step that decodes reads all pages, so this adds little to what it moves.
"""

import numpy as np

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.operations import Copy, PageOperation
from fineserve_jax.kv.page_table import PageTable
from fineserve_jax.kv.slab_pool import SlabPool

MAX_STEP_BYTES = 64 * 2**20
TIDY_SHARE = 1 / 64
"""Most of the arena to move in a step when nobody is short of memory."""
MAX_FREE = 1 / 256
"""Share of a pool's pages that may be free without being moved together."""


class Compaction:
    """Moves pages from slab to slab.

    Args:
        allocator: gives the pages their new places.
        table: where they lie is noted here.
        operations: queue for the device, to which the copies are appended.
        enabled: whether any are moved; off only to compare.

    Attributes:
        enabled: as given.
        max_step_bytes: most bytes moved between two steps, unless a request would lose its pages otherwise.
        num_pages: pages moved since the start.
        is_cut_short: whether more would have been moved in this step.
    """

    def __init__(
        self, allocator: SlabAllocator, table: PageTable, operations: list[PageOperation], enabled: bool = True
    ) -> None:
        self._allocator, self._table, self._operations, self.enabled = allocator, table, operations, enabled
        self.max_step_bytes = MAX_STEP_BYTES
        self.num_pages = 0
        self.is_cut_short = False
        self._moved_bytes = 0
        self._pools_used: set[SlabPool] = set()

    def begin_step(self) -> None:
        """Another step's worth of bytes may be moved; a few are."""
        self._moved_bytes = 0
        self.is_cut_short = False
        if self.enabled:
            self._tidy()

    def move(self, at_once: bool = False) -> bool:
        """Move pages out of one slab; False if no slab can be freed so, or no more may be moved in this step.

        Args:
            at_once: move all of the slab's pages, however much was moved in this step.
        """
        pool = self._cheapest(list(self._allocator.pools.values())) if self.enabled else None
        if pool is None:
            return False
        is_moved = self._empty_a_slab(pool, None if at_once else self.max_step_bytes)
        self.is_cut_short |= not is_moved
        return is_moved

    def _tidy(self) -> None:
        """Move pages together in pools with many free ones; not while only one pool was used since all was free."""
        allocator = self._allocator
        pools = [pool for pool in allocator.pools.values() if pool.num_slabs]
        self._pools_used = self._pools_used.union(pools) if pools else set()
        if len(self._pools_used) < 2:
            return
        limit = min(self.max_step_bytes, int(TIDY_SHARE * allocator.num_units * allocator.unit_bytes))
        while True:
            loose = [pool for pool in pools if pool.free_pages > MAX_FREE * pool.num_slabs * pool.capacity]
            pool = self._cheapest(loose)
            if pool is None or not self._empty_a_slab(pool, limit):
                return

    def _empty_a_slab(self, pool: SlabPool, limit: int | None) -> bool:
        """Move pages out of the pool's emptiest slab; False if the `limit` of bytes in this step allows none."""
        allocator, units = self._allocator, self._table.units
        page_bytes = pool.page_units * allocator.unit_bytes
        most = pool.capacity if limit is None else (limit - self._moved_bytes) // page_bytes
        if most < 1:
            return False
        slab = pool.emptiest
        handles = self._handles_in(slab)
        for tag, source, target in allocator.move_pages(pool, slab, most):
            page_class = allocator.by_tag[tag].page_class
            units[handles[source]] = target
            self._operations.append(Copy(source, target, page_class, page_class))
            self._moved_bytes += page_bytes
            self.num_pages += 1
        return True

    def _cheapest(self, pools: list[SlabPool]) -> SlabPool | None:
        """The pool in which freeing a slab moves the fewest bytes, of those in which one can be freed."""
        pools = [pool for pool in pools if pool.free_pages >= pool.capacity]
        free = self._allocator.slab_free
        costs = [(pool.capacity - free[pool.emptiest]) * pool.page_units for pool in pools]
        return pools[int(np.argmin(costs))] if pools else None

    def _handles_in(self, slab: int) -> dict[int, int]:
        """First unit -> handle of the pages that lie in a slab."""
        first = slab * self._allocator.slab_units
        units = np.frombuffer(self._table.units, np.int32)
        handles = np.flatnonzero((units >= first) & (units < first + self._allocator.slab_units))
        return dict(zip(units[handles].tolist(), handles.tolist(), strict=True))
