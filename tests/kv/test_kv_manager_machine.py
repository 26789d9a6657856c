"""The KV manager against requests that are only numbers of tokens, under every policy."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from kv_cases import BF16, INT4, INT8, OTHER_INT8, PAGE_SIZE, UNIT_BYTES, arena, pages_of, snapshot

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams

CLASSES = {("m", "bf16"): BF16, ("m", "int8"): INT8, ("m", "int4"): INT4, ("other", "int8"): OTHER_INT8}
SAMPLING = SamplingParams()


def request(model: str, kv_precision: str, number: int = 0) -> Request:
    return Request(f"r{number}", model, kv_precision, SAMPLING, [], 0, 10_000, number, RequestTimes(arrival_s=0.0))


def pages_for(key: tuple[str, str], num_tokens: int) -> tuple[int, int]:
    """Pages and residual pages that so many tokens take."""
    if key == ("m", "int4"):
        return num_tokens // PAGE_SIZE, int(num_tokens > 0)
    return -(-num_tokens // PAGE_SIZE), 0


class ManagerMachine(RuleBasedStateMachine):
    """`tokens`: request -> the most tokens it was granted pages for."""

    @initialize(
        policy=st.sampled_from(["elastic", "partitioned", "uniform"]),
        num_slabs=st.integers(3, 12),
        slab_units=st.integers(7, 30),
    )
    def build(self, policy, num_slabs, slab_units):
        self.manager = KVManager(arena(num_slabs, slab_units, policy, classes=()), CLASSES)
        self.tokens: dict[Request, int] = {}
        self.arrived = 0

    @rule(key=st.sampled_from(sorted(CLASSES)), num_tokens=st.integers(0, 40))
    def admit(self, key, num_tokens):
        self.arrived += 1
        model, kv_precision = key
        self.grow(request(model, kv_precision, self.arrived), num_tokens)

    @precondition(lambda self: self.tokens)
    @rule(data=st.data(), num_tokens=st.integers(0, 60))
    def grow_one(self, data, num_tokens):
        self.grow(data.draw(st.sampled_from(list(self.tokens))), num_tokens)

    def grow(self, request, num_tokens):
        key = (request.model, request.kv_precision)
        before = snapshot(self.manager)
        pages, has_residual = pages_of(self.manager, request), self.manager.residual_unit(request) is not None
        demand = self.manager.demand(request, num_tokens)
        want_pages, want_residual = pages_for(key, num_tokens)
        lacking = {CLASSES[key]: max(0, want_pages - len(pages)), BF16: int(want_residual and not has_residual)}
        if key == ("m", "bf16"):
            lacking = {BF16: max(0, want_pages - len(pages))}
        assert demand == {page_class: count for page_class, count in lacking.items() if count}
        expected = self.manager.pool.allocator.can_allocate(demand)
        num_moved = self.manager.pool.compaction.num_pages
        granted = self.manager.grow(request, num_tokens)
        moved = self.manager.pool.compaction.num_pages > num_moved
        assert granted == expected or (granted and moved), "only moving pages makes more room"
        if not granted:
            assert moved or snapshot(self.manager) == before
            assert self.manager.holds(request).num_pages == len(pages)
            return
        assert moved or pages_of(self.manager, request)[: len(pages)] == pages
        if num_tokens or request in self.tokens:
            self.tokens[request] = max(num_tokens, self.tokens.get(request, 0))
        request.num_computed_tokens = min(num_tokens, self.tokens.get(request, 0))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def compute(self, data):
        request = data.draw(st.sampled_from(list(self.tokens)))
        request.num_computed_tokens = data.draw(st.integers(0, self.tokens[request]))

    @precondition(lambda self: self.tokens)
    @rule(data=st.data())
    def release(self, data):
        request = data.draw(st.sampled_from(list(self.tokens)))
        self.manager.release(request)
        del self.tokens[request]
        assert (pages_of(self.manager, request), self.manager.residual_unit(request)) == ([], None)
        before = snapshot(self.manager)
        self.manager.release(request)
        assert snapshot(self.manager) == before

    @invariant()
    def requests_hold_exactly_what_is_out(self):
        check_integrity(self.manager)
        for request, num_tokens in self.tokens.items():
            held = self.manager.holds(request)
            key = (request.model, request.kv_precision)
            assert held.page_class == CLASSES[key]
            assert (held.num_pages, int(held.groups[0].residual is not None)) == pages_for(key, num_tokens)

    @invariant()
    def segments_cover_the_cached_tokens_in_order(self):
        for request in self.tokens:
            pages, residual = pages_of(self.manager, request), self.manager.residual_unit(request)
            cached = request.num_computed_tokens
            places = []
            for segment in self.manager.segments(request, cached):
                assert segment.first_position == len(places)
                assert 0 < segment.num_tokens <= len(segment.pages) * PAGE_SIZE
                places += [(segment.kv_format, segment.pages[i // PAGE_SIZE]) for i in range(segment.num_tokens)]
            closed = cached if residual is None else cached // PAGE_SIZE * PAGE_SIZE
            expected = [(request.kv_precision, pages[i // PAGE_SIZE]) for i in range(closed)]
            assert places == expected + [("bf16", residual)] * (cached - closed)
            with pytest.raises(PageError, match="grow it first"):
                self.manager.segments(request, self.tokens[request] + PAGE_SIZE)

    @invariant()
    def usage_adds_up(self):
        usage = measure_usage(self.manager)
        tokens: dict[PageClass, int] = dict.fromkeys(CLASSES.values(), 0)
        for request in self.tokens:
            page_class = CLASSES[request.model, request.kv_precision]
            for position in range(request.num_computed_tokens):
                in_residual = page_class == INT4 and position >= request.num_computed_tokens // PAGE_SIZE * PAGE_SIZE
                tokens[BF16 if in_residual else page_class] += 1
        for kv_format, row in usage.formats.items():
            mine = [c for c in tokens if c.kv_format == kv_format]
            exact = sum(tokens[c] * c.page_bytes / PAGE_SIZE for c in mine)
            assert exact <= row.needed_bytes < exact + len(mine)
            assert row.cached_tokens == sum(tokens[c] for c in mine)
            assert row.needed_bytes <= row.reserved_bytes or not row.cached_tokens
            assert 0 <= row.free_bytes <= usage.free_bytes
        allocator = self.manager.pool.allocator
        slab_bytes = allocator.slab_units * UNIT_BYTES
        bound = allocator.usable_slabs - len(allocator.free_slabs)
        assert usage.reserved_bytes == bound * slab_bytes
        # Under "uniform" the formats share slabs, and each one's part is rounded down.
        parts = sum(row.reserved_bytes for row in usage.formats.values())
        assert usage.reserved_bytes - len(CLASSES) < parts <= usage.reserved_bytes
        assert usage.reserved_bytes <= usage.usable_bytes
        assert usage.cached_tokens == sum(tokens.values())


TestManager = ManagerMachine.TestCase
TestManager.settings = settings(max_examples=80, stateful_step_count=25, suppress_health_check=[HealthCheck.too_slow])
