"""What an allocator's slabs hold: slabs, pages and bytes, by class and in all."""

from dataclasses import dataclass

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass


@dataclass(frozen=True, slots=True)
class ClassStats:
    """One class's part of the arena.

    Attributes:
        slabs: slabs bound to its pool (under "uniform" one pool serves all classes).
        owned_pages: pages it has out.
        free_pages: free pages in its pool's slabs.
        allocatable_pages: pages it could get now: those, and what the free slabs in its quota would give.
        reserved_bytes: bytes of the slabs that serve it: its pages with what they are rounded up by, and its
            part of the pool's free pages and unused slab ends, in proportion to the pages it owns.
        free_bytes: bytes that it could still take: free pages of its pool, and free slabs in its quota.
            Classes can take the same free slab, so these do not add up over classes.
    """

    slabs: int
    owned_pages: int
    free_pages: int
    allocatable_pages: int
    reserved_bytes: int
    free_bytes: int


@dataclass(frozen=True, slots=True)
class AllocatorStats:
    """The whole arena: `usable_bytes = reserved_bytes + free_slabs * slab_bytes`.

    Attributes:
        classes: what each class has.
        usable_slabs, free_slabs: slabs that can ever be handed out, and those bound to no pool.
        slab_bytes: bytes of a slab.
        reserved_bytes: bytes of the bound slabs.
        free_bytes: bytes of the free slabs and of the free pages in bound ones.
    """

    classes: dict[PageClass, ClassStats]
    usable_slabs: int
    free_slabs: int
    slab_bytes: int
    reserved_bytes: int
    free_bytes: int


def allocator_stats(allocator: SlabAllocator) -> AllocatorStats:
    """Slabs, pages and bytes, by class and in all."""
    slab_bytes = allocator.slab_units * allocator.unit_bytes
    free_slabs = len(allocator.free_slabs)
    free_in_pools = sum(pool.free_pages * pool.page_units for pool in allocator.pools.values()) * allocator.unit_bytes
    return AllocatorStats(
        classes={page_class: _class_stats(allocator, page_class, slab_bytes) for page_class in allocator.members},
        usable_slabs=allocator.usable_slabs,
        free_slabs=free_slabs,
        slab_bytes=slab_bytes,
        reserved_bytes=(allocator.usable_slabs - free_slabs) * slab_bytes,
        free_bytes=free_slabs * slab_bytes + free_in_pools,
    )


def _class_stats(allocator: SlabAllocator, page_class: PageClass, slab_bytes: int) -> ClassStats:
    member = allocator.members[page_class]
    pool = member.pool
    owned_by_pool = pool.num_slabs * pool.capacity - pool.free_pages
    page_bytes = pool.page_units * allocator.unit_bytes
    return ClassStats(
        slabs=pool.num_slabs,
        owned_pages=member.owned_pages,
        free_pages=pool.free_pages,
        allocatable_pages=allocator.allocatable(page_class),
        reserved_bytes=pool.num_slabs * slab_bytes * member.owned_pages // max(owned_by_pool, 1),
        free_bytes=pool.free_pages * page_bytes + allocator.available_slabs(pool) * slab_bytes,
    )
