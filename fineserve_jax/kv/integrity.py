"""The books of an allocator and of a KV manager, audited from their smallest records upwards."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import IntegrityError
from fineserve_jax.kv.pool import SlabPool

if TYPE_CHECKING:
    from fineserve_jax.kv.manager import KVManager
    from fineserve_jax.kv.slabs import SlabAllocator


def check_manager(kv: "KVManager", thorough: bool = True) -> None:
    """Raise IntegrityError unless the allocator's books are right, every page that it has out is in the page table
    once, and pages are held by exactly as many requests as the table says, or idle in the prefix cache.

    Args:
        thorough: check the prefix cache page by page, too.
    """
    check_allocator(kv.allocator)
    units, tags = np.array(kv.table.units), np.frombuffer(bytes(kv.table.tags), np.uint8)
    _check_table(kv, units, tags)
    _check_holders(kv, units, tags)
    if thorough:
        _check_prefix(kv)


def _check_table(kv: "KVManager", units: np.ndarray, tags: np.ndarray) -> None:
    """The handles of each class stand for the pages that it owns, one for one."""
    allocator = kv.allocator
    _equal("handles in use", len(kv.table), int(np.count_nonzero(units)))
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


def _name_odd_page(page_class: PageClass, listed: np.ndarray, owned: np.ndarray) -> None:
    if (repeated := listed[1:][listed[1:] == listed[:-1]]).size:
        raise IntegrityError(f"page {repeated[0]} of {page_class} has two handles")
    odd = np.setxor1d(listed, owned, assume_unique=True)
    who = "has a handle but is not allocated" if odd[0] in listed else "is allocated but has no handle"
    raise IntegrityError(f"page {odd[0]} of {page_class} {who} ({odd.size} such pages)")


def _check_holders(kv: "KVManager", units: np.ndarray, tags: np.ndarray) -> None:
    """Each page has as many holders as the table says; what has none is idle in the prefix cache."""
    runs = [run for held in kv.held.values() for run in held.runs]
    residuals = [held.residual for held in kv.held.values() if held.residual is not None]
    in_runs = np.frombuffer(b"".join([run.handles for run in runs]), np.int32)
    counted = np.bincount(np.concatenate([in_runs, np.array(residuals, np.int32)]), minlength=len(units))
    _equal("highest handle", max(len(units), len(counted)), len(units))
    recorded = np.array(kv.table.holders)
    for handle in np.flatnonzero(recorded != counted).tolist():
        _equal(f"holders of page {handle}", int(recorded[handle]), int(counted[handle]))
    unheld = np.flatnonzero((recorded == 0) & (units > 0))
    if len(unheld) != len(kv.prefix.idle):
        lost = set(unheld.tolist()).symmetric_difference(kv.prefix.idle)
        raise IntegrityError(f"pages {_short(lost)} are held by nobody and not kept for their prefix, but not free")
    own_tags = {id(page_class): member.tag for page_class, member in kv.allocator.members.items()}
    expected = np.repeat([own_tags[id(run.page_class)] for run in runs], [len(run.handles) for run in runs])
    for i in np.flatnonzero(tags[in_runs] != expected).tolist():
        handle = int(in_runs[i])
        _equal(f"the tag of page {handle}, which is in a request's run", int(tags[handle]), int(expected[i]))


def _check_prefix(kv: "KVManager") -> None:
    for handle, page in kv.prefix.by_handle.items():
        owner = kv.allocator.by_tag[kv.table.tags[handle]].page_class
        _equal(f"the class of listed page {handle}", owner, page.page_class)
        if page.writer is not None and page.writer not in kv.held:
            raise IntegrityError(f"page {handle} waits for request {page.writer.request_id}, which holds nothing")
    idle = [kv.prefix.by_handle[handle] for handle in kv.prefix.idle]
    _equal("idle pages by class", +kv.prefix.idle_pages, Counter(page.page_class for page in idle))
    _equal("units of idle pages", kv.prefix.idle_units, sum(kv.allocator.page_units(page.page_class) for page in idle))
    _equal("idle pages that are not ready", [], [page.handle for page in idle if not page.ready])
    _equal("idle pages with holders", [], [page.handle for page in idle if kv.table.holders[page.handle]])
    _equal("idle pages that are free", [], [page.handle for page in idle if not kv.table.units[page.handle]])


def check_allocator(allocator: "SlabAllocator") -> None:
    """Raise IntegrityError, naming what does not add up, unless every page and slab is accounted for once."""
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


def _check_free_slabs(allocator: "SlabAllocator", tags: np.ndarray, pools: np.ndarray) -> None:
    listed = np.concatenate(([0], np.sort(np.array(allocator.free_slabs))))
    unbound = np.flatnonzero(pools == 0)
    _equal_arrays("free slabs, with that of the null page", listed, unbound)
    owned = unbound[tags[unbound].any(axis=1)]
    _equal("free slabs with pages in use", [], owned.tolist())


def _check_pool(allocator: "SlabAllocator", pool: SlabPool, tags: np.ndarray, pools: np.ndarray) -> None:
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
        raise IntegrityError(f"{what}: {_short(recorded)} in the books, {_short(counted)} counted")


def _equal_arrays(what: str, recorded: np.ndarray, counted: np.ndarray) -> None:
    if not np.array_equal(recorded, counted):
        _equal(what, recorded.tolist(), counted.tolist())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
