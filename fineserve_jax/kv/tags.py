"""Who owns each page: one byte a page, whatever the number of slabs and the lengths of their pages.

The byte of a slab's n-th page is at `slab * slots + n`, its *place*; `slots` is how many of the shortest
pages a slab takes, so slabs of longer pages leave the end of their row at 0. A byte is the tag of the class
that owns the page, 0 while the page is free.
"""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.slab_pool import Member, SlabPool

FEW = 32
"""Up to so many pages a loop is faster than numpy."""


class PageTags:
    """The owners of all pages of `num_slabs` slabs of `slab_units` units."""

    def __init__(self, num_slabs: int, slab_units: int) -> None:
        self.num_slabs = num_slabs
        self.slab_units = slab_units
        self.slots = 1
        self.data = bytearray(num_slabs)

    @property
    def flat(self) -> np.ndarray:
        """The tags as u8[num_slabs * slots], a view."""
        return np.frombuffer(self.data, np.uint8)

    @property
    def rows(self) -> np.ndarray:
        """The tags as u8[num_slabs, slots], a view."""
        return self.flat.reshape(self.num_slabs, self.slots)

    def widen(self, slots: int) -> None:
        """Make room for at least `slots` pages a slab."""
        if slots <= self.slots:
            return
        wider = bytearray(self.num_slabs * slots)
        np.frombuffer(wider, np.uint8).reshape(-1, slots)[:, : self.slots] = self.rows
        self.data, self.slots = wider, slots

    def take(self, member: Member, slab: int, free: int, count: int) -> Iterable[int]:
        """Tag the first `count` free pages of a slab that has `free`; their first units."""
        data, tag, length = self.data, member.tag, member.pool.page_units
        base, first_unit = slab * self.slots, slab * self.slab_units
        if free == member.pool.capacity:
            data[base : base + count] = bytes([tag]) * count
            return range(first_unit, first_unit + count * length, length)
        pages, place = [], base
        for _ in range(count):
            place = data.find(0, place)
            data[place] = tag
            pages.append(first_unit + (place - base) * length)
        return pages

    def take_whole(self, member: Member, slabs: Sequence[int]) -> list[int]:
        """Tag all pages of free slabs; their first units."""
        pool = member.pool
        self.rows[slabs, : pool.capacity] = member.tag
        pages = np.array(slabs)[:, None] * self.slab_units + np.arange(pool.capacity) * pool.page_units
        return pages.ravel().tolist()

    def release(self, member: Member, pages: Sequence[int]) -> dict[int, int]:
        """Mark pages that the class owns as free; how many of them lie in each slab.

        Raises:
            PageError: a page that the class does not own, or one named twice; then nothing has changed.
        """
        if len(pages) > FEW and (freed := self._release_many(member, pages)) is not None:
            return freed
        data, tag, pool = self.data, member.tag, member.pool
        slab_units, slots, length, capacity = self.slab_units, self.slots, pool.page_units, pool.capacity
        places = []
        for page in pages:
            slab, offset = divmod(page, slab_units)
            slot, within = divmod(offset, length)
            place = slab * slots + slot
            # Whether the slab is the pool's need not be asked: the tag occurs in no other slab.
            if within or slot >= capacity or not 0 < slab < self.num_slabs or data[place] != tag:
                raise PageError(
                    f"page {page} is not owned by {member.page_class}: it was freed already, belongs to "
                    "another class, or no page begins there; free a page once, as what it was allocated for"
                )
            places.append(place)
        if len(set(places)) < len(places):
            page = Counter(pages).most_common(1)[0][0]
            raise PageError(f"page {page} of {member.page_class} is freed twice in one call; name each page once")
        for place in places:
            data[place] = 0
        return Counter([place // slots for place in places])

    def _release_many(self, member: Member, pages: Sequence[int]) -> dict[int, int] | None:
        """The same for many pages; None, and nothing changed, if some are to be refused."""
        units, flat, slots = np.array(pages), self.flat, self.slots
        slabs = units // self.slab_units
        offsets = units - slabs * self.slab_units
        numbers = offsets // member.pool.page_units
        places = np.sort(slabs * slots + numbers)
        in_range = slots <= places[0] and places[-1] < len(flat) and numbers.max() < member.pool.capacity
        if not in_range or (numbers * member.pool.page_units != offsets).any():
            return None
        if (flat[places] != member.tag).any() or (places[1:] == places[:-1]).any():
            return None
        flat[places] = 0
        slabs = places // slots
        ends = [*(np.flatnonzero(slabs[1:] != slabs[:-1]) + 1).tolist(), len(slabs)]
        starts = [0, *ends[:-1]]
        return {slab: end - start for slab, start, end in zip(slabs[starts].tolist(), starts, ends, strict=True)}

    def pages_in(self, slab: int, pool: SlabPool) -> list[tuple[int, int]]:
        """Place and tag of each page in use in a slab."""
        base = slab * self.slots
        tags = enumerate(self.data[base : base + pool.capacity], base)
        return [(place, tag) for place, tag in tags if tag]

    def leave(self, place: int, pool: SlabPool) -> int:
        """Mark a page as free; its first unit."""
        self.data[place] = 0
        slab, slot = divmod(place, self.slots)
        return slab * self.slab_units + slot * pool.page_units

    def pages_of(self, member: Member) -> np.ndarray:
        """First units of the pages that the class owns, i64[pages], ascending."""
        slabs, slots = np.nonzero(self.rows == member.tag)
        return slabs * self.slab_units + slots * member.pool.page_units
