"""The page pool: pages are taken, shared, released and evicted here, for whoever holds them.

    take            new pages, each with the reference count 1, all or none
    incref, decref  one more, or one less, who holds a page; at 0 it is freed, unless the prefix cache keeps it
    make_room       evicts cached pages that nobody holds, and moves pages together, until so many more fit
    enqueue, copy   what the device has to do with pages before the next step

Beneath it: where free pages are (`allocator`), where each page lies and how many hold it (`page_table`), what is kept
for later requests (`prefix_cache`), and moving pages together (`compaction`).
"""

import itertools
from array import array
from collections.abc import Mapping
from typing import TypeAlias

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.compaction import Compaction
from fineserve_jax.kv.operations import Copy, PageOperation
from fineserve_jax.kv.page_table import Handles, PageTable
from fineserve_jax.kv.prefix_cache import PrefixCache
from fineserve_jax.kv.slab_pool import Share

Demand: TypeAlias = Mapping[PageClass, int]
MOST_EVICTED_AT_A_TIME = 8
"""Cached pages that are evicted before it is asked again whether there is room; fewer where few are cached."""


class PagePool:
    """Pages of an arena, by handle.

    Args:
        allocator: owner of the arena's pages; nobody else may allocate from it.
        reserve_slabs: free slabs that eviction and compaction keep at hand, and that `take` leaves to others if it is
            told to leave anything.
        compacts: whether pages are moved together; off only to compare.

    Attributes:
        table: where each page lies, and how many hold it.
        prefix_cache: full pages by what they hold.
        compaction: see there.
    """

    def __init__(self, allocator: SlabAllocator, reserve_slabs: int = 0, compacts: bool = True) -> None:
        self.allocator = allocator
        self.reserve_slabs = reserve_slabs
        self.table = PageTable()
        self.prefix_cache = PrefixCache(allocator.page_units)
        self._operations: list[PageOperation] = []
        self.compaction = Compaction(allocator, self.table, self._operations, compacts)

    def emptied(self) -> "PagePool":
        """Another pool of the same arena in which no page is taken or cached, and no operation is queued; it counts
        on."""
        fresh = PagePool(self.allocator.emptied(), self.reserve_slabs, self.compaction.enabled)
        fresh.prefix_cache.stats = self.prefix_cache.stats
        fresh.compaction.num_pages = self.compaction.num_pages
        return fresh

    def begin_step(self) -> None:
        """To be called once before each step: restores the reserve of free slabs, as far as that moves or evicts
        pages that nobody holds."""
        self.compaction.begin_step()
        if len(self.allocator.free_slabs) < self.reserve_slabs:
            self.make_room({}, self.reserve_slabs, patient=True)

    # -- taken, shared, released ---------------------------------------------------------------------------

    def take(self, demand: Demand, leaving: Demand | None = None) -> "dict[PageClass, array[int]] | None":
        """Handles of new pages, or None if they cannot all be had even after evicting what nobody holds.

        Args:
            leaving: pages that must be left for others; besides, `reserve_slabs` are. None: nothing need be left.
        """
        wanted = dict(demand)
        for page_class, count in (leaving or {}).items():
            wanted[page_class] = wanted.get(page_class, 0) + count
        spare_slabs = 0 if leaving is None else self.reserve_slabs
        if not self.make_room(wanted, spare_slabs, at_once=leaving is None):
            return None
        units = self.allocator.allocate(demand)
        assert units is not None, "what fits with others left room fits without"
        return {
            page_class: self.table.add(pages, self.allocator.member(page_class).tag)
            for page_class, pages in units.items()
        }

    def incref(self, handles: Handles) -> None:
        """Raise the reference count of each page by one."""
        self.prefix_cache.pin(handles)
        self.table.incref(handles)

    def decref(self, handles: Handles) -> None:
        """Lower the reference count of each page by one; at 0 a page is freed unless the prefix cache keeps it."""
        self._free(self.prefix_cache.keep(self.table.decref(handles)))

    def _free(self, handles: Handles) -> None:
        for tag, same in self.table.by_tag(handles).items():
            self.allocator.free(self.allocator.by_tag[tag].page_class, self.table.remove(same))

    # -- room ----------------------------------------------------------------------------------------------

    def lacking_units(self, wanted: Demand, spare_slabs: int = 0) -> int:
        """Units that are wanted beyond those free or in evictable pages; 0 or less: none."""
        allocator = self.allocator
        units = sum(allocator.page_units(page_class) * count for page_class, count in wanted.items())
        return units + spare_slabs * allocator.slab_units - allocator.free_units - self.prefix_cache.evictable_units

    def make_room(self, wanted: Demand, spare_slabs: int = 0, *, at_once: bool = False, patient: bool = False) -> bool:
        """Whether that many pages can be had now, pages that nobody holds evicted and pages moved as need be.

        Args:
            at_once: do not leave to later steps what is too much to move in one.
            patient: evict nothing while pages that could be moved are left to later steps.
        """
        allocator, cache = self.allocator, self.prefix_cache
        if allocator.can_allocate(wanted, spare_slabs):
            return True
        if self.lacking_units(wanted, spare_slabs) > 0:
            return False
        shares = {allocator.member(page_class).pool.share for page_class in wanted}
        evictable, at_a_time = cache.in_lru_order(), min(1 + len(cache.evictable) // 64, MOST_EVICTED_AT_A_TIME)
        while not allocator.can_allocate(wanted, spare_slabs):
            if self.compaction.move():
                continue
            is_early = patient and self.compaction.is_cut_short
            handles = [] if is_early else list(itertools.islice(evictable, at_a_time))
            if not handles:
                if at_once and self.compaction.move(at_once=True):
                    continue
                return False
            # A slab of any share's may be a spare one, if those are what is wanting.
            if len(allocator.free_slabs) >= spare_slabs:
                handles = [handle for handle in handles if self._share_of(handle) in shares]
            self._evict(handles)
        return True

    def max_tokens(self, page_class: PageClass) -> int:
        """Most tokens that a request of the class could have if no page were in use; 0 if none fits."""
        allocator = self.allocator
        fits, too_many = 0, (allocator.num_units + 1) * page_class.page_size
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if allocator.fits_empty(page_class.demand(middle)):
                fits = middle
            else:
                too_many = middle
        return fits

    def evict_all(self, model: str | None = None) -> None:
        """Evict every page that nobody holds, of a model or of all."""
        cache = self.prefix_cache
        self._evict([h for h in cache.evictable if model in (None, cache.by_handle[h].page_class.model)])

    def _share_of(self, cached: int) -> Share:
        return self.allocator.member(self.prefix_cache.by_handle[cached].page_class).pool.share

    def _evict(self, handles: Handles) -> None:
        for handle in handles:
            self.prefix_cache.remove(handle)
        self.prefix_cache.stats.evicted_pages += len(handles)
        self._free(handles)

    # -- operations ----------------------------------------------------------------------------------------

    def enqueue(self, operation: PageOperation) -> None:
        """Queue an operation for the device."""
        self._operations.append(operation)

    def copy(self, source: int, target: int, source_class: PageClass, target_class: PageClass) -> None:
        """Queue the copy of a page, handle to handle; it is requantized if the classes differ."""
        units = self.table.units
        self._operations.append(Copy(units[source], units[target], source_class, target_class))

    def take_operations(self) -> list[PageOperation]:
        """What the device has to do, in this order, before it computes the next step."""
        operations = self._operations.copy()
        self._operations.clear()  # compaction appends to the same list
        return operations
