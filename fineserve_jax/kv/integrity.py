"""Audits of an allocator and of a KV manager, from their smallest records upwards."""

from collections import Counter

import numpy as np

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import IntegrityError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_pool import SlabPool
from fineserve_jax.validation import shortened


def check_integrity(kv: KVManager, thorough: bool = True) -> None:
    """Check that the allocator agrees with itself, that each page in use is in the page table once, and that pages are
    held by exactly as many requests as their reference counts say, or are evictable.

    Args:
        thorough: check the prefix cache page by page, too; without, it costs little enough for every step.

    Raises:
        IntegrityError: naming what does not add up.
    """
    check_allocator(kv.pool.allocator)
    table = kv.pool.table
    units, tags = np.array(table.units), np.frombuffer(bytes(table.tags), np.uint8)
    _check_table(kv, units, tags)
    _check_ref_counts(kv, units, tags)
    _check_windows(kv)
    if thorough:
        _check_prefix_cache(kv)


def _check_table(kv: KVManager, units: np.ndarray, tags: np.ndarray) -> None:
    """The handles of each class stand for the pages that it owns, one for one."""
    allocator = kv.pool.allocator
    _equal("handles in use", len(kv.pool.table), int(np.count_nonzero(units)))
    by_place, slots = allocator.tags.flat, allocator.tags.slots
    for page_class, member in allocator.members.items():
        own = units[tags == member.tag]
        slabs = own // allocator.slab_units
        offsets = own - slabs * allocator.slab_units
        numbers = offsets // member.pool.page_units
        within = offsets - numbers * member.pool.page_units
        places = np.minimum(slabs, allocator.num_slabs - 1) * slots + np.minimum(numbers, slots - 1)
        once = np.zeros(len(by_place), bool)
        once[places] = True
        as_many = len(own) == np.count_nonzero(once) == member.owned_pages
        if not as_many or within.any() or (by_place[places] != member.tag).any() or numbers.max(initial=0) >= slots:
            _name_odd_page(page_class, np.sort(own), allocator.owned_pages(page_class))


def _name_odd_page(page_class: PageClass, recorded: np.ndarray, owned: np.ndarray) -> None:
    if (repeated := recorded[1:][recorded[1:] == recorded[:-1]]).size:
        raise IntegrityError(f"page {repeated[0]} of {page_class} has two handles")
    odd = np.setxor1d(recorded, owned, assume_unique=True)
    who = "has a handle but is not allocated" if odd[0] in recorded else "is allocated but has no handle"
    raise IntegrityError(f"page {odd[0]} of {page_class} {who} ({odd.size} such pages)")


def _check_ref_counts(kv: KVManager, units: np.ndarray, tags: np.ndarray) -> None:
    """Each page is held by as many requests as its reference count says; one that nobody holds is evictable."""
    evictable = kv.pool.prefix_cache.evictable
    groups = [group for held in kv.held.values() for group in held.groups]
    runs = [run for group in groups for run in group.runs]
    residuals = [group.residual for group in groups if group.residual is not None]
    in_runs = np.frombuffer(b"".join([run.handles for run in runs]), np.int32)
    counted = np.bincount(np.concatenate([in_runs, np.array(residuals, np.int32)]), minlength=len(units))
    _equal("highest handle", max(len(units), len(counted)), len(units))
    recorded = np.array(kv.pool.table.ref_counts)
    for handle in np.flatnonzero(recorded != counted).tolist():
        _equal(f"reference count of page {handle}", int(recorded[handle]), int(counted[handle]))
    unreferenced = np.flatnonzero((recorded == 0) & (units > 0))
    if len(unreferenced) != len(evictable):
        lost = set(unreferenced.tolist()).symmetric_difference(evictable)
        raise IntegrityError(
            f"pages {shortened(str(lost))} are held by nobody and not kept for their prefix, but not free"
        )
    own_tags = {id(page_class): member.tag for page_class, member in kv.pool.allocator.members.items()}
    expected = np.repeat([own_tags[id(run.page_class)] for run in runs], [len(run.handles) for run in runs])
    for i in np.flatnonzero(tags[in_runs] != expected).tolist():
        handle = int(in_runs[i])
        _equal(f"the tag of page {handle}, which is in a request's run", int(tags[handle]), int(expected[i]))


def _check_windows(kv: KVManager) -> None:
    """No page is dropped that is still attended to, and no group lacks pages of computed tokens."""
    for request, held in kv.held.items():
        computed = request.num_computed_tokens
        for group in held.groups:
            first = group.page_class.first_page(computed)
            if group.num_dropped > first:
                raise IntegrityError(
                    f"request {request.request_id}: {group.num_dropped} pages of {group.page_class} are dropped, but "
                    f"those from page {first} on are attended to"
                )


def _check_prefix_cache(kv: KVManager) -> None:
    cache, table, allocator = kv.pool.prefix_cache, kv.pool.table, kv.pool.allocator
    for handle, block in cache.by_handle.items():
        owner = allocator.by_tag[table.tags[handle]].page_class
        _equal(f"the class of cached page {handle}", owner, block.page_class)
        if block.writer is not None and block.writer not in kv.held:
            raise IntegrityError(f"page {handle} waits for request {block.writer.request_id}, which holds nothing")
    evictable = [cache.by_handle[handle] for handle in cache.evictable]
    units = sum(allocator.page_units(block.page_class) for block in evictable)
    _equal("evictable pages by class", +cache.evictable_pages, Counter(block.page_class for block in evictable))
    _equal("units of evictable pages", cache.evictable_units, units)
    _equal("evictable pages that are not ready", [], [block.handle for block in evictable if not block.ready])
    referenced = [block.handle for block in evictable if table.ref_counts[block.handle]]
    _equal("evictable pages that requests hold", [], referenced)
    _equal("evictable pages that are free", [], [block.handle for block in evictable if not table.units[block.handle]])


def check_allocator(allocator: SlabAllocator) -> None:
    """Check that free and owned pages make up the arena, each once, and that all counts agree.

    Raises:
        IntegrityError: naming what does not add up.
    """
    tags = allocator.tags.rows
    pools = np.frombuffer(allocator.slab_pools, np.uint8)
    _check_free_slabs(allocator, tags, pools)
    for pool in allocator.pools.values():
        _check_pool(allocator, pool, tags, pools)
    for page_class, member in allocator.members.items():
        _equal(f"pages owned by {page_class}", member.owned_pages, int((tags == member.tag).sum()))
    for share in allocator.shares.values():
        bound = sum(pool.num_slabs for pool in allocator.pools.values() if pool.share is share)
        _equal(f"slabs counted against share {share.name!r}", share.bound, bound)


def _check_free_slabs(allocator: SlabAllocator, tags: np.ndarray, pools: np.ndarray) -> None:
    recorded = np.concatenate(([0], np.sort(np.array(allocator.free_slabs))))
    unbound = np.flatnonzero(pools == 0)
    _equal_arrays("free slabs, with that of the null page", recorded, unbound)
    owned = unbound[tags[unbound].any(axis=1)]
    _equal("free slabs with pages in use", [], owned.tolist())


def _check_pool(allocator: SlabAllocator, pool: SlabPool, tags: np.ndarray, pools: np.ndarray) -> None:
    name = f"pool {pool.number} (pages of {pool.page_units} units)"
    slabs = np.flatnonzero(pools == pool.number)
    pages = tags[slabs, : pool.capacity]
    free = (pages == 0).sum(axis=1)
    _equal(f"slabs of {name}", pool.num_slabs, len(slabs))
    _equal(f"free pages of {name}", pool.free_pages, int(free.sum()))
    _equal_arrays(f"free pages in each slab of {name}", np.array(allocator.slab_free)[slabs], free)
    _equal(f"slabs of {name} that should have become free", [], slabs[free == pool.capacity].tolist())
    in_end = tags[slabs, pool.capacity :].any(axis=1)
    _equal(f"slabs of {name} with pages in their unused ends", [], slabs[in_end].tolist())
    own_tags = np.zeros(256, bool)
    own_tags[[0, *(member.tag for member in allocator.members.values() if member.pool is pool)]] = True
    foreign = ~own_tags[pages].all(axis=1)
    _equal(f"slabs of {name} with foreign pages", [], slabs[foreign].tolist())
    bucketed = {slab: count for count, bucket in pool.buckets.items() for slab in bucket}
    begun = free > 0
    partial = dict(zip(slabs[begun].tolist(), free[begun].tolist(), strict=True))
    _equal(f"slabs by number of free pages of {name}", bucketed, partial)
    occupied = sum(1 << count for count, bucket in pool.buckets.items() if bucket)
    _equal(f"occupied buckets of {name}", pool.occupied, occupied)


def _equal(what: str, recorded: object, counted: object) -> None:
    if recorded != counted:
        raise IntegrityError(f"{what}: {shortened(str(recorded))} in the books, {shortened(str(counted))} counted")


def _equal_arrays(what: str, recorded: np.ndarray, counted: np.ndarray) -> None:
    if not np.array_equal(recorded, counted):
        _equal(what, recorded.tolist(), counted.tolist())
