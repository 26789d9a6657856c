"""Classes of models that come and go, beside those that stay: books, tags and slabs after any order of events."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from kv_cases import UNIT_BYTES, snapshot

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.integrity import check_allocator
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.recording import _slab_map

MODELS = ("a", "b", "c")
SLABS, SLAB_UNITS = 9, 24


def classes_of(model: str, length: int) -> list[PageClass]:
    return [PageClass(model, name, units, 16, 1) for name, units in (("bf16", length), ("int8", max(1, length // 2)))]


class ModelsMachine(RuleBasedStateMachine):
    """`known`: the classes of each model, `owned`: first unit of each page that is out -> its class."""

    policy = "elastic"

    @initialize()
    def build(self):
        self.allocator = SlabAllocator(SLABS * SLAB_UNITS, SLAB_UNITS, self.policy, unit_bytes=UNIT_BYTES)
        self.known: dict[str, list[PageClass]] = {}
        self.owned: dict[int, PageClass] = {}

    @rule(model=st.sampled_from(MODELS), length=st.integers(1, SLAB_UNITS))
    def register(self, model, length):
        if model not in self.known:
            longest = max((c.page_units for c in self.owned.values()), default=SLAB_UNITS)
            if self.policy == "uniform":
                length = min(length, longest)
            self.known[model] = classes_of(model, length)
            for page_class in self.known[model]:
                self.allocator.register(page_class)

    @rule(model=st.sampled_from(MODELS))
    def unregister(self, model):
        if any(page_class.model == model for page_class in self.owned.values()):
            before = snapshot(self.allocator)
            with pytest.raises(PageError, match=f"of {model}/.* are out; free them"):
                self.allocator.unregister(model)
            assert snapshot(self.allocator) == before
            return
        self.allocator.unregister(model)
        self.known.pop(model, None)

    @rule(model=st.sampled_from(MODELS), which=st.integers(0, 1), count=st.integers(1, 9))
    def allocate(self, model, which, count):
        if model in self.known:
            page_class = self.known[model][which]
            pages = self.allocator.allocate({page_class: count})
            assert (pages is not None) == (count <= self.could_be_had[page_class])
            self.owned |= dict.fromkeys(pages[page_class] if pages else (), page_class)

    @rule(data=st.data())
    def free(self, data):
        if self.owned:
            some = data.draw(st.sets(st.sampled_from(sorted(self.owned)), min_size=1))
            for page_class in {self.owned[page] for page in some}:
                self.allocator.free(page_class, [page for page in some if self.owned[page] is page_class])
            self.owned = {page: page_class for page, page_class in self.owned.items() if page not in some}

    @invariant()
    def the_books_are_exact(self):
        if not hasattr(self, "allocator"):
            return
        allocator = self.allocator
        check_allocator(allocator)
        assert set(allocator.members) == {page_class for own in self.known.values() for page_class in own}
        assert len({member.tag for member in allocator.members.values()}) == len(allocator.members)
        assert max(allocator.by_tag, default=0) <= 2 * len(MODELS)
        counts = Counter(self.owned.values())
        assert {c: member.owned_pages for c, member in allocator.members.items() if member.owned_pages} == counts
        self.could_be_had = {page_class: allocator.allocatable(page_class) for page_class in allocator.members}
        if not self.owned:  # whatever models are there, they have the whole arena
            assert len(allocator.free_slabs) == SLABS - 1
            fresh = SlabAllocator(SLABS * SLAB_UNITS, SLAB_UNITS, self.policy, unit_bytes=UNIT_BYTES)
            for page_class in allocator.members:
                fresh.register(page_class)
            assert self.could_be_had == {page_class: fresh.allocatable(page_class) for page_class in fresh.members}


class UniformModelsMachine(ModelsMachine):
    policy = "uniform"


class PartitionedModelsMachine(ModelsMachine):
    policy = "partitioned"


some = settings(max_examples=25, stateful_step_count=25, deadline=None)
TestElastic, TestUniform, TestPartitioned = (
    machine.TestCase for machine in (ModelsMachine, UniformModelsMachine, PartitionedModelsMachine)
)
TestElastic.settings = TestUniform.settings = TestPartitioned.settings = some


def test_a_record_tells_slabs_by_their_pools_whatever_models_have_gone():
    (one, _), (other, _) = classes_of("a", 4), classes_of("b", 3)
    allocator = SlabAllocator(SLABS * SLAB_UNITS, SLAB_UNITS, classes=[one, other], unit_bytes=UNIT_BYTES)
    allocator.unregister("a")
    allocator.allocate({other: 4})

    books = KVManager(allocator, {})
    (row,) = [row for row in _slab_map(books).tolist() if row[0]]
    assert row == [allocator.pools["b", "bf16"].number, -(-255 * 4 // 8)]
