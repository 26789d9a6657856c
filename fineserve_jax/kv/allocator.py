"""The allocator of the arena: slabs bound to pools while in use, pages handed out of them.

    units   0         S         2S        3S        4S        5S   num_units
            | slab 0  | slab 1  | slab 2  | slab 3  | slab 4  | .. |
            |null page|p p p p .|P  P  .  | free    |p p p p .| not used: shorter than a slab
                       \\_ pool of p's class, `.` is the end that no whole page fits

Host side only: nothing here touches a device.
"""

import itertools
from array import array
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.policies import slab_policy
from fineserve_jax.kv.slab_pool import Member, Share, SlabPool
from fineserve_jax.kv.tags import PageTags

NULL_UNIT = 0
MAX_CLASSES = 255
MAX_UNITS = 2**31 - 1


class SlabAllocator:
    """Hands out pages of an arena, by class, all-or-nothing.

    A free slab belongs to nobody. It is bound to a pool when the pool needs a page and has none free, and is
    free again when its last page is. Pages come from the fullest slab first, so that slabs empty out. Slab 0
    is never handed out: unit 0 begins the null page that padding points at.

    Args:
        num_units: units of the arena; those behind the last whole slab stay unused.
        slab_units: units of a slab, at least the longest page's; see `kv/slab_size.py`.
        policy: "elastic", "partitioned" or "uniform"; see `kv/policies.py`.
        classes: page classes to know from the start; those of their residual pages need not be named.
        shares: for "partitioned", the weight of each KV format.
        unit_bytes: bytes of a unit, for statistics.

    Raises:
        ConfigError: sizes, policy, shares or classes that do not go together.
    """

    def __init__(
        self,
        num_units: int,
        slab_units: int,
        policy: str = "elastic",
        classes: Iterable[PageClass] = (),
        shares: Mapping[str, float] | None = None,
        unit_bytes: int = 256,
    ) -> None:
        _check_sizes(num_units, slab_units, unit_bytes)
        self.num_units = num_units
        self.slab_units = slab_units
        self.unit_bytes = unit_bytes
        self.num_slabs = num_units // slab_units
        self.policy = slab_policy(policy, shares)
        self.members: dict[PageClass, Member] = {}
        self.by_tag: dict[int, Member] = {}
        self.pools: dict[tuple[str, ...], SlabPool] = {}
        self.shares: dict[str, Share] = {}
        self.tags = PageTags(self.num_slabs, slab_units)
        self.slab_pools = bytearray(self.num_slabs)  # number of the pool that a slab is bound to; 0: none
        self.slab_free = array("i", bytes(4 * self.num_slabs))  # free pages of a bound slab
        self.free_slabs = array("i", range(self.num_slabs - 1, 0, -1))
        for page_class in classes:
            self.register(page_class)

    def emptied(self) -> "SlabAllocator":
        """Another allocator of the same arena and classes, of which no page is in use. Reads nothing that handing pages
        out and taking them back changes."""
        fresh = SlabAllocator(self.num_units, self.slab_units, unit_bytes=self.unit_bytes)
        fresh.policy = self.policy
        for page_class in list(self.members):
            fresh.register(page_class)
        return fresh

    @property
    def usable_slabs(self) -> int:
        """Slabs that can be handed out: all whole ones but that of the null page."""
        return self.num_slabs - 1

    # -- classes -------------------------------------------------------------------------------------------

    def register(self, page_class: PageClass) -> None:
        """Make a class, that of its residual pages, and those of other layer groups known; a class known already
        changes nothing.

        Raises:
            ConfigError: longer than a slab, another class of that model and format, too many classes, no
                share, or (under "uniform") longer than the pages already in use.
        """
        if page_class.residual is not None:
            self.register(page_class.residual)
        for other in page_class.others:
            self.register(other)
        if page_class in self.members:
            return
        self._check_class(page_class)
        share_name = self.policy.share_name(page_class)
        limits = self.policy.slab_limits({*self.shares, share_name}, self.usable_slabs)
        share = self.shares.setdefault(share_name, Share(share_name, 0))
        self._limit_shares(limits)
        number = _unused(pool.number for pool in self.pools.values())
        pool = self.pools.setdefault(self.policy.pool_name(page_class), SlabPool(number, 0, 0, share))
        self._set_length(pool, max(pool.page_units, page_class.page_units))
        member = self.members[page_class] = Member(page_class, _unused(self.by_tag), pool)
        self.by_tag[member.tag] = member

    def unregister(self, model: str) -> None:
        """Forget the classes of a model, of which no page may be out. Others may have their tags, and the numbers of
        pools that are left without a class.

        Raises:
            PageError: a page of one of them is out; then nothing has changed.
        """
        leaving = [member for page_class, member in self.members.items() if page_class.model == model]
        if busy := [member for member in leaving if member.owned_pages]:
            raise PageError(
                f"{busy[0].owned_pages} pages of {busy[0].page_class} are out; free them before the class is forgotten"
            )
        for member in leaving:
            del self.members[member.page_class], self.by_tag[member.tag]
        lengths: dict[SlabPool, int] = {}
        for page_class, member in self.members.items():
            lengths[member.pool] = max(page_class.page_units, lengths.get(member.pool, 0))
        self.pools = {name: pool for name, pool in self.pools.items() if pool in lengths}
        for pool, length in lengths.items():
            if not pool.num_slabs:  # else its slabs are carved already
                self._set_length(pool, length)
        self.shares = {pool.share.name: pool.share for pool in self.pools.values()}
        self._limit_shares(self.policy.slab_limits(self.shares, self.usable_slabs))

    def _limit_shares(self, limits: Mapping[str, int]) -> None:
        for share in self.shares.values():
            share.limit = limits[share.name]

    def _set_length(self, pool: SlabPool, page_units: int) -> None:
        """Set the length of a pool's pages, of which there may be some only if it stays the same."""
        pool.page_units, pool.capacity = page_units, self.slab_units // page_units
        self.tags.widen(pool.capacity)

    def _check_class(self, page_class: PageClass) -> None:
        for known in self.members:
            if str(known) == str(page_class):
                raise ConfigError(f"{page_class!r} differs from {known!r}; a model and format have one class a group")
        if len(self.members) == MAX_CLASSES:
            raise ConfigError(f"{page_class} would be class {MAX_CLASSES + 1} of the arena; use a second arena")
        length, room = page_class.page_units, page_class.page_units * self.unit_bytes
        if length > self.slab_units:
            raise ConfigError(
                f"a page of {page_class} takes {length} units, a slab has {self.slab_units}; "
                f"use slab_units={length} or more"
            )
        if page_class.page_bytes > room:
            raise ConfigError(
                f"{page_class}: page_bytes={page_class.page_bytes} do not fit in {length} units of "
                f"{self.unit_bytes} bytes ({room}); raise page_units, or give the arena's unit_bytes"
            )
        pool = self.pools.get(self.policy.pool_name(page_class))
        if pool is not None and length > pool.page_units and pool.num_slabs:
            raise ConfigError(
                f"{page_class} takes {length} units a page, and pages of {pool.page_units} are in use; "
                "under the slab policy 'uniform', name the longest class before the first page is handed out"
            )

    def member(self, page_class: PageClass) -> Member:
        """What the allocator keeps about a class.

        Raises:
            ConfigError: a class that was not registered.
        """
        try:
            return self.members[page_class]
        except KeyError:
            known = ", ".join(map(str, self.members)) or "none"
            raise ConfigError(f"{page_class} is no class of this arena ({known}); register it first") from None

    def page_units(self, page_class: PageClass) -> int:
        """Units that a page of the class takes here: under "uniform" as many as the longest class's."""
        return self.member(page_class).pool.page_units

    def share_names(self, page_class: PageClass) -> frozenset[str]:
        """Shares that pages of a request in the class count against, those of all groups and residual ones included."""
        groups = page_class.groups
        residuals = [group.residual for group in groups if group.residual is not None]
        return frozenset(map(self.policy.share_name, [*groups, *residuals]))

    # -- what fits -----------------------------------------------------------------------------------------

    def can_allocate(self, demand: Mapping[PageClass, int], spare_slabs: int = 0) -> bool:
        """Whether `allocate` of the same demand would succeed now, and leave so many slabs free."""
        if len(demand) == 1 and not spare_slabs:  # most demands are for a page of which one is free
            ((page_class, count),) = demand.items()
            if 0 <= count <= self.member(page_class).pool.free_pages:
                return True
        return self._fits(demand, empty=False, spare_slabs=spare_slabs)

    def fits_empty(self, demand: Mapping[PageClass, int]) -> bool:
        """Whether `allocate` of the same demand would succeed if no page were in use."""
        return self._fits(demand, empty=True)

    def _fits(self, demand: Mapping[PageClass, int], empty: bool, spare_slabs: int = 0) -> bool:
        wanted: dict[SlabPool, int] = {}
        for page_class, count in demand.items():
            if count < 0:
                raise ValueError(f"a demand of {count} pages of {page_class}; it must be 0 or more")
            pool = self.member(page_class).pool
            wanted[pool] = wanted.get(pool, 0) + count
        slabs_left = (self.usable_slabs if empty else len(self.free_slabs)) - spare_slabs
        new_slabs: dict[Share, int] = {}
        for pool, count in wanted.items():
            missing = count if empty else count - pool.free_pages
            if missing > 0:
                slabs = -(-missing // pool.capacity)
                slabs_left -= slabs
                new_slabs[pool.share] = new_slabs.get(pool.share, 0) + slabs
        return slabs_left >= 0 and all(
            slabs <= share.limit - (0 if empty else share.bound) for share, slabs in new_slabs.items()
        )

    @property
    def free_units(self) -> int:
        """Units of the free slabs and of the free pages in bound ones."""
        in_pools = sum(pool.free_pages * pool.page_units for pool in self.pools.values())
        return len(self.free_slabs) * self.slab_units + in_pools

    def allocatable(self, page_class: PageClass) -> int:
        """Pages of the class that could be had now, if no other class took any."""
        pool = self.member(page_class).pool
        return pool.free_pages + pool.capacity * self.available_slabs(pool)

    def available_slabs(self, pool: SlabPool) -> int:
        """Free slabs that a pool could bind now."""
        return max(0, min(len(self.free_slabs), pool.share.limit - pool.share.bound))

    # -- pages out and back --------------------------------------------------------------------------------

    def allocate(self, demand: Mapping[PageClass, int]) -> dict[PageClass, list[int]] | None:
        """Hand out as many pages of each class as asked for, or none at all.

        Returns:
            First units of the pages by class, or None when they cannot all be had; then nothing has changed.
        """
        if not self.can_allocate(demand):
            return None
        return {page_class: self._take(self.member(page_class), count) for page_class, count in demand.items()}

    def _take(self, member: Member, count: int) -> list[int]:
        pool = member.pool
        pages: list[int] = []
        left = count
        while left:
            fullest = pool.pop_fullest()
            if fullest is None and left >= 2 * pool.capacity:
                slabs = self._bind(pool, left // pool.capacity)
                pages += self.tags.take_whole(member, slabs)
                left -= len(slabs) * pool.capacity
                continue
            slab, free = fullest or (self._bind(pool, 1)[0], pool.capacity)
            taken = min(free, left)
            pages += self.tags.take(member, slab, free, taken)
            self.slab_free[slab] = free - taken
            if taken < free:
                pool.put(slab, free - taken)
            left -= taken
        pool.free_pages -= count
        member.owned_pages += count
        return pages

    def _bind(self, pool: SlabPool, count: int) -> list[int]:
        """Bind `count` free slabs to a pool; their numbers. The caller sets their free counts."""
        slabs = self.free_slabs[: -count - 1 : -1].tolist()
        del self.free_slabs[-count:]
        for slab in slabs:
            self.slab_pools[slab] = pool.number
        pool.num_slabs += count
        pool.share.bound += count
        pool.free_pages += count * pool.capacity
        return slabs

    def free(self, page_class: PageClass, pages: Sequence[int]) -> None:
        """Take pages back.

        Raises:
            PageError: a page that the class does not own, or one named twice; then nothing has changed.
        """
        member = self.member(page_class)
        pool = member.pool
        freed = self.tags.release(member, pages)
        member.owned_pages -= len(pages)
        pool.free_pages += len(pages)
        for slab, count in freed.items():
            before = self.slab_free[slab]
            after = before + count
            if before:
                pool.remove(slab, before)
            if after < pool.capacity:
                self.slab_free[slab] = after
                pool.put(slab, after)
            else:
                self._unbind(pool, slab)

    def move_pages(self, pool: SlabPool, slab: int, most: int) -> list[tuple[int, int, int]]:
        """Give up to `most` pages of a slab other places, in the fullest other slabs of its pool.

        Returns:
            (tag, first unit it had, first unit it has) of each page moved. The slab is free when none is left.
        """
        moves = []
        free = self.slab_free[slab]
        pool.remove(slab, free)
        for place, tag in self.tags.pages_in(slab, pool)[:most]:
            fullest = pool.pop_fullest()
            if fullest is None:
                break
            target, room = fullest
            (unit,) = self.tags.take(self.by_tag[tag], target, room, 1)
            self.slab_free[target] = room - 1
            if room > 1:
                pool.put(target, room - 1)
            moves.append((tag, self.tags.leave(place, pool), unit))
            free += 1
        if free == pool.capacity:
            self._unbind(pool, slab)
        else:
            self.slab_free[slab] = free
            pool.put(slab, free)
        return moves

    def _unbind(self, pool: SlabPool, slab: int) -> None:
        self.slab_free[slab] = 0
        self.slab_pools[slab] = 0
        self.free_slabs.append(slab)
        pool.num_slabs -= 1
        pool.share.bound -= 1
        pool.free_pages -= pool.capacity

    def owned_pages(self, page_class: PageClass) -> np.ndarray:
        """First units of the pages the class has out, i64[pages], ascending."""
        return self.tags.pages_of(self.member(page_class))


def _unused(numbers: Iterable[int]) -> int:
    """The least number from 1 on that is not among these."""
    taken = set(numbers)
    return next(number for number in itertools.count(1) if number not in taken)


def _check_sizes(num_units: int, slab_units: int, unit_bytes: int) -> None:
    if slab_units < 1 or unit_bytes < 1:
        raise ConfigError(f"slab_units={slab_units}, unit_bytes={unit_bytes}: each must be at least 1")
    if num_units > MAX_UNITS:
        raise ConfigError(f"num_units={num_units}: page tables hold at most {MAX_UNITS}; use longer units")
    if num_units < 2 * slab_units:
        raise ConfigError(
            f"an arena of {num_units} units ({num_units * unit_bytes} bytes) does not hold two slabs of "
            f"{slab_units}, one for the null page and one to hand out; "
            f"give it at least {2 * slab_units * unit_bytes} bytes"
        )
