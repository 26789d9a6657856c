"""The slab allocator against a plain model that knows only which page owns each unit, under every policy."""

from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_cases import BF16, FP32, INT4, INT8, OTHER_INT8, UNIT_BYTES, snapshot

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.integrity import check_allocator
from fineserve_jax.kv.stats import allocator_stats

CLASSES = (BF16, INT8, INT4, FP32)
demands = st.dictionaries(st.sampled_from(CLASSES), st.integers(0, 9), max_size=4)


class AllocatorMachine(RuleBasedStateMachine):
    """`owned`: first unit of each page out -> its class. All that is expected is derived from it."""

    policy = "elastic"

    @initialize(
        slab_units=st.integers(13, 45),
        num_slabs=st.integers(2, 12),
        odd_units=st.integers(0, 12),
        shares=st.none()
        | st.fixed_dictionaries({name: st.floats(0.1, 5) for name in ("bf16", "int8", "int4", "fp32")}),
    )
    def build(self, slab_units, num_slabs, odd_units, shares):
        self.slab_units, self.num_slabs = slab_units, num_slabs
        self.allocator = SlabAllocator(
            num_slabs * slab_units + odd_units,
            slab_units,
            self.policy,
            CLASSES,
            shares if self.policy == "partitioned" else None,
            UNIT_BYTES,
        )
        self.owned: dict[int, PageClass] = {}

    # What the policy says of a class, in words of the tests' own.

    def length(self, page_class: PageClass) -> int:
        return page_class.page_units

    def pool(self, page_class: PageClass) -> object:
        return page_class

    def quota_name(self, page_class: PageClass) -> str:
        return ""

    def quota(self, name: str) -> int:
        return self.num_slabs - 1

    # What follows from the pages that are out.

    def capacity(self, page_class: PageClass) -> int:
        return self.slab_units // self.length(page_class)

    def pages_by_slab(self) -> Counter:
        return Counter(page // self.slab_units for page in self.owned)

    def slabs_of(self, page_class: PageClass) -> dict[int, int]:
        """Free pages of each slab that the class's pool has bound."""
        pages = self.pages_by_slab()
        slabs = {p // self.slab_units for p, c in self.owned.items() if self.pool(c) == self.pool(page_class)}
        return {slab: self.capacity(page_class) - pages[slab] for slab in slabs}

    def bound_by_quota(self) -> Counter:
        slabs = {(page // self.slab_units, self.quota_name(c)) for page, c in self.owned.items()}
        return Counter(name for _, name in slabs)

    def fits(self, demand) -> bool:
        pools: dict[object, tuple[PageClass, int]] = {}
        for page_class, count in demand.items():
            _, so_far = pools.get(self.pool(page_class), (page_class, 0))
            pools[self.pool(page_class)] = (page_class, so_far + count)
        new_slabs: Counter = Counter()
        for page_class, count in pools.values():
            missing = max(0, count - sum(self.slabs_of(page_class).values()))
            new_slabs[self.quota_name(page_class)] += -(-missing // self.capacity(page_class))
        bound = self.bound_by_quota()
        free_slabs = self.num_slabs - 1 - len(self.pages_by_slab())
        return new_slabs.total() <= free_slabs and all(
            count == 0 or bound[name] + count <= self.quota(name) for name, count in new_slabs.items()
        )

    @rule(page_class=st.sampled_from(CLASSES), count=st.integers(1, 9))
    def allocate_one_class(self, page_class, count):
        self.allocate({page_class: count})

    @rule(demand=demands)
    def allocate_several_classes(self, demand):
        self.allocate(demand)

    def allocate(self, demand):
        expected = self.fits(demand)
        before, slabs_before = snapshot(self.allocator), {c: self.slabs_of(c) for c in demand}
        assert self.allocator.can_allocate(demand) == expected
        pages = self.allocator.allocate(demand)
        if not expected:
            assert pages is None
            assert snapshot(self.allocator) == before
            return
        assert {c: len(pages[c]) for c in demand} == demand
        for page_class, units in pages.items():
            for page in units:
                assert page not in self.owned
                self.owned[page] = page_class
        for page_class in demand:
            self.check_fullest_first(slabs_before[page_class], self.slabs_of(page_class))

    def check_fullest_first(self, before: dict[int, int], after: dict[int, int]) -> None:
        """No slab gives a page, and no free slab is bound, while a fuller one still has a page to give."""
        gave = [free for slab, free in before.items() if after[slab] < free]
        emptiest = max(gave, default=0) if after.keys() == before.keys() else float("inf")
        assert all(after[slab] == 0 for slab, free in before.items() if free < emptiest)

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def free(self, data):
        page_class = data.draw(st.sampled_from(sorted(set(self.owned.values()), key=str)))
        mine = sorted(page for page, c in self.owned.items() if c == page_class)
        pages = data.draw(st.lists(st.sampled_from(mine), min_size=1, unique=True))
        self.allocator.free(page_class, pages)
        for page in pages:
            del self.owned[page]

    def near_misses(self, page_class: PageClass) -> list[int]:
        """Numbers that look like pages: in a slab's unused end, inside a page, beyond the arena."""
        arena, capacity = self.num_slabs * self.slab_units, self.capacity(page_class)
        ends = [s * self.slab_units + capacity * self.length(page_class) for s in self.slabs_of(page_class)]
        beside = [page + step for page in self.owned for step in (0, 1, arena, -arena)]
        return [0, -1, *ends, *beside]

    @rule(data=st.data(), page_class=st.sampled_from(CLASSES))
    def refuse_to_free_what_is_not_owned(self, data, page_class):
        mine = sorted(page for page, c in self.owned.items() if c == page_class)
        misses = {page for page in self.near_misses(page_class) if self.owned.get(page) != page_class}
        foreign = data.draw(st.sampled_from(sorted(misses)))
        pages = data.draw(st.permutations([*mine[:3], foreign]))
        before = snapshot(self.allocator)
        with pytest.raises(PageError, match=f"page {foreign} is not owned by {page_class}"):
            self.allocator.free(page_class, pages)
        assert snapshot(self.allocator) == before

    @precondition(lambda self: self.owned)
    @rule(data=st.data())
    def refuse_to_free_a_page_twice(self, data):
        page, page_class = data.draw(st.sampled_from(sorted(self.owned.items())))
        before = snapshot(self.allocator)
        with pytest.raises(PageError, match=f"page {page} .* twice"):
            self.allocator.free(page_class, [page, page])
        assert snapshot(self.allocator) == before
        self.allocator.free(page_class, [page])
        del self.owned[page]
        with pytest.raises(PageError, match="freed already"):
            self.allocator.free(page_class, [page])

    @rule()
    def register_a_later_class(self):
        """Its pages are shorter than all others, so that rows of page tags have to grow."""
        self.allocator.register(OTHER_INT8)

    @invariant()
    def books_agree_with_the_model(self):
        check_allocator(self.allocator)
        stats = allocator_stats(self.allocator)
        for page_class in CLASSES:
            mine = sorted(page for page, c in self.owned.items() if c == page_class)
            assert self.allocator.owned_pages(page_class).tolist() == mine
            assert stats.classes[page_class].owned_pages == len(mine)
            assert stats.classes[page_class].slabs == len(self.slabs_of(page_class))
            assert stats.classes[page_class].free_pages == sum(self.slabs_of(page_class).values())
        assert stats.free_slabs == self.num_slabs - 1 - len(self.pages_by_slab())

    @invariant()
    def pages_lie_in_one_slab_each_and_overlap_nowhere(self):
        owner: dict[int, int] = {}
        for page, page_class in self.owned.items():
            units = range(page, page + self.length(page_class))
            assert units[0] // self.slab_units == units[-1] // self.slab_units
            for unit in units:
                assert unit not in owner
                owner[unit] = page
        # The null page is slab 0; units behind the last whole slab belong to nobody.
        assert all(self.slab_units <= unit < self.num_slabs * self.slab_units for unit in owner)

    @invariant()
    def quotas_hold(self):
        assert all(bound <= self.quota(name) for name, bound in self.bound_by_quota().items())

    @invariant()
    def allocatable_is_exact(self):
        for page_class in CLASSES:
            pages = self.allocator.allocatable(page_class)
            assert self.fits({page_class: pages})
            assert not self.fits({page_class: pages + 1})

    def teardown(self):
        for page_class in set(getattr(self, "owned", {}).values()):
            self.allocator.free(page_class, [page for page, c in self.owned.items() if c == page_class])
        if hasattr(self, "owned"):
            check_allocator(self.allocator)
            assert allocator_stats(self.allocator).free_slabs == self.num_slabs - 1


class PartitionedMachine(AllocatorMachine):
    policy = "partitioned"

    def quota_name(self, page_class):
        return page_class.kv_format

    def quota(self, name):
        return self.allocator.shares[name].limit

    @invariant()
    def quotas_divide_the_arena(self):
        assert sum(share.limit for share in self.allocator.shares.values()) == self.num_slabs - 1


class UniformMachine(AllocatorMachine):
    policy = "uniform"

    def length(self, page_class):
        return max(c.page_units for c in CLASSES)

    def pool(self, page_class):
        return "all"


thorough = settings(max_examples=60, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow])
TestElastic = AllocatorMachine.TestCase
TestPartitioned = PartitionedMachine.TestCase
TestUniform = UniformMachine.TestCase
TestElastic.settings = TestPartitioned.settings = TestUniform.settings = thorough
