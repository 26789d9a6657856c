"""The books of an allocator and of a KV manager, audited from their smallest records upwards."""

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from fineserve_jax.kv.errors import IntegrityError
from fineserve_jax.kv.pool import SlabPool

if TYPE_CHECKING:
    from fineserve_jax.kv.manager import KVManager
    from fineserve_jax.kv.slabs import SlabAllocator


def check_manager(kv: "KVManager") -> None:
    """Raise IntegrityError unless the allocator's books are right, every page that it has out is in the page table
    once, and pages are held by exactly as many requests as the table says, or idle in the prefix cache."""
    check_allocator(kv.allocator)
    used, units = kv.table.used(), np.array(kv.table.units, np.int64)
    tags = np.frombuffer(bytes(kv.table.tags), np.uint8)
    for page_class, member in kv.allocator.members.items():
        listed = np.sort(units[used[tags[used] == member.tag]])
        if (repeated := listed[1:][listed[1:] == listed[:-1]]).size:
            raise IntegrityError(f"page {repeated[0]} of {page_class} has two handles")
        odd = np.setxor1d(listed, kv.allocator.owned_pages(page_class), assume_unique=True)
        if odd.size:
            who = "has a handle but is not allocated" if odd[0] in listed else "is allocated but has no handle"
            raise IntegrityError(f"page {odd[0]} of {page_class} {who} ({odd.size} such pages)")
    holders = Counter(handle for held in kv.held.values() for run in held.runs for handle in run.handles)
    holders.update(held.tail for held in kv.held.values() if held.tail is not None)
    for handle in {*used.tolist(), *holders}:
        _equal(f"holders of page {handle}", kv.table.holders[handle], holders[handle])
        if not holders[handle] and handle not in kv.prefix.idle:
            raise IntegrityError(f"page {handle} is held by nobody and not kept for its prefix, but not free")
    for held in kv.held.values():
        for run in held.runs:
            tag = kv.allocator.member(run.page_class).tag
            _equal(f"classes of the pages of a run of {run.page_class}", {tag}, {int(tags[i]) for i in run.handles})
    _check_prefix(kv)


def _check_prefix(kv: "KVManager") -> None:
    for handle, page in kv.prefix.by_handle.items():
        owner = kv.allocator.by_tag[kv.table.tags[handle]].page_class
        _equal(f"the class of listed page {handle}", owner, page.page_class)
        if page.writer is not None and page.writer not in kv.held:
            raise IntegrityError(f"page {handle} waits for request {page.writer.request_id}, which holds nothing")
    idle = [kv.prefix.by_handle[handle] for handle in kv.prefix.idle]
    _equal("units of idle pages", kv.prefix.idle_units, sum(page.page_class.page_units for page in idle))
    _equal("idle pages that are not ready", [], [page.handle for page in idle if not page.ready])
    _equal("idle pages with holders", [], [page.handle for page in idle if kv.table.holders[page.handle]])


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
    listed = sorted(allocator.free_slabs)
    unbound = np.flatnonzero(pools == 0)
    _equal("free slabs, with that of the null page", [0, *listed], unbound.tolist())
    owned = unbound[tags[unbound].any(axis=1)]
    _equal("free slabs with pages in use", [], owned.tolist())


def _check_pool(allocator: "SlabAllocator", pool: SlabPool, tags: np.ndarray, pools: np.ndarray) -> None:
    name = f"pool {pool.number} (pages of {pool.page_units} units)"
    slabs = np.flatnonzero(pools == pool.number)
    pages = tags[slabs, : pool.capacity]
    free = (pages == 0).sum(axis=1)
    _equal(f"slabs of {name}", pool.num_slabs, len(slabs))
    _equal(f"free pages of {name}", pool.free_pages, int(free.sum()))
    _equal(f"free pages in each slab of {name}", [allocator.slab_free[slab] for slab in slabs], free.tolist())
    _equal(f"slabs of {name} that should have become free", [], slabs[free == pool.capacity].tolist())
    in_tail = tags[slabs, pool.capacity :].any(axis=1)
    _equal(f"slabs of {name} with pages in their tails", [], slabs[in_tail].tolist())
    own_tags = [0] + [member.tag for member in allocator.members.values() if member.pool is pool]
    foreign = ~np.isin(pages, own_tags).all(axis=1)
    _equal(f"slabs of {name} with foreign pages", [], slabs[foreign].tolist())
    bucketed = {slab: count for count, bucket in pool.buckets.items() for slab in bucket}
    partial = {slab: count for slab, count in zip(slabs.tolist(), free.tolist(), strict=True) if count}
    _equal(f"slabs by number of free pages of {name}", bucketed, partial)
    occupied = sum(1 << count for count, bucket in pool.buckets.items() if bucket)
    _equal(f"occupied buckets of {name}", pool.occupied, occupied)


def _equal(what: str, recorded: object, counted: object) -> None:
    if recorded != counted:
        raise IntegrityError(f"{what}: {_short(recorded)} in the books, {_short(counted)} counted")


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
