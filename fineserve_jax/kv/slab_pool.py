"""The slabs of one pool, sorted by how many free pages each has left."""

from dataclasses import dataclass, field

from fineserve_jax.kv.classes import PageClass


@dataclass(eq=False, slots=True)
class Share:
    """A bound on the slabs that some pools may have bound together."""

    name: str
    limit: int
    bound: int = 0


@dataclass(eq=False, slots=True)
class Member:
    """A page class inside an allocator: `tag` marks its pages, 1 to 255."""

    page_class: PageClass
    tag: int
    pool: "SlabPool"
    owned_pages: int = 0


@dataclass(eq=False, slots=True)
class SlabPool:
    """Slabs that are carved into pages of one length.

    A slab is in the bucket of its number of free pages; full slabs are in none, and a slab whose pages are
    all free does not stay in the pool. `occupied` has bit n set when bucket n has a slab: its lowest bit
    names the fullest slabs that still have a page.

    Attributes:
        number: 1 to 255, marks the pool's slabs.
        page_units: units a page takes.
        capacity: pages a slab holds.
        share: what its slabs count against.
        num_slabs: slabs bound to the pool.
        free_pages: free pages in those slabs.
    """

    number: int
    page_units: int
    capacity: int
    share: Share
    num_slabs: int = 0
    free_pages: int = 0
    buckets: dict[int, dict[int, None]] = field(default_factory=dict)
    occupied: int = 0

    def put(self, slab: int, free: int) -> None:
        """Remember that a slab has `free` free pages, 0 < free < capacity."""
        self.buckets.setdefault(free, {})[slab] = None
        self.occupied |= 1 << free

    def remove(self, slab: int, free: int) -> None:
        """Forget a slab that `put` was told of."""
        bucket = self.buckets[free]
        del bucket[slab]
        if not bucket:
            self.occupied ^= 1 << free

    @property
    def emptiest(self) -> int:
        """A slab with the most free pages. There must be one that is not full."""
        return next(iter(self.buckets[self.occupied.bit_length() - 1]))

    def pop_fullest(self) -> tuple[int, int] | None:
        """Take out a slab with the fewest free pages: its number and how many. None when all are full."""
        if not self.occupied:
            return None
        free = (self.occupied & -self.occupied).bit_length() - 1
        bucket = self.buckets[free]
        slab, _ = bucket.popitem()
        if not bucket:
            self.occupied ^= 1 << free
        return slab, free
