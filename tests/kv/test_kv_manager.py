"""What would fit alone, what is refused, and what the manager's own audit finds."""

import dataclasses

import pytest
from kv_cases import BF16, FP32, INT4, INT8, PAGE_SIZE, arena, pages_of

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.errors import IntegrityError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.request_pages import Segment
from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams

CLASSES = {("m", "bf16"): BF16, ("m", "int8"): INT8, ("m", "int4"): INT4}


def manager(num_slabs: int, policy: str = "elastic", **options) -> KVManager:
    return KVManager(arena(num_slabs, policy=policy, **options), CLASSES)


def request(kv_precision: str) -> Request:
    return Request("r", "m", kv_precision, SamplingParams(), [], 0, 10_000, 0, RequestTimes(arrival_s=0.0))


@pytest.mark.parametrize("policy", ["elastic", "partitioned", "uniform"])
@pytest.mark.parametrize("num_slabs", [1, 2, 3, 5])
@pytest.mark.parametrize("kv_format", ["bf16", "int8", "int4"])
def test_what_fits_alone_is_what_an_empty_arena_grants(policy, num_slabs, kv_format):
    most = manager(num_slabs, policy).max_tokens_alone("m", kv_format)
    for num_tokens in range(most + 2 * PAGE_SIZE):
        empty = manager(num_slabs, policy)
        assert empty.fits_alone("m", kv_format, num_tokens) == (num_tokens <= most)
        assert empty.grow(request(kv_precision=kv_format), num_tokens) == (num_tokens <= most)


def test_what_fits_alone_does_not_depend_on_what_is_cached():
    kv = manager(4)
    before = kv.max_tokens_alone("m", "int4")
    assert kv.grow(request("bf16"), 20)
    assert kv.max_tokens_alone("m", "int4") == before
    assert not kv.grow(request("int4"), before)


def test_the_residual_is_kept_while_pages_close_behind_it():
    kv, row = manager(6), request("int4")
    assert kv.grow(row, 1)
    residual = kv.residual_unit(row)
    assert residual is not None
    assert kv.segments(row, 1) == [Segment("bf16", [residual], 0, 1)]
    assert kv.grow(row, 2 * PAGE_SIZE + 3)
    pages = pages_of(kv, row)
    assert kv.residual_unit(row) == residual
    assert kv.segments(row, 2 * PAGE_SIZE + 3) == [
        Segment("int4", pages, 0, 2 * PAGE_SIZE),
        Segment("bf16", [residual], 2 * PAGE_SIZE, 3),
    ]
    assert kv.segments(row, PAGE_SIZE) == [Segment("int4", pages[:1], 0, PAGE_SIZE)]
    assert kv.segments(row, 0) == []


def test_requests_grow_together_or_not_at_all():
    kv, rows = manager(3), [request("int8"), request("int4"), request("int8")]
    for row in rows:
        row.token_ids = [0] * PAGE_SIZE
        assert kv.grow(row, 1)
    assert kv.grow_together(rows)
    assert [len(pages_of(kv, row)) for row in rows] == [1, 1, 1]
    check_integrity(kv)
    before = [pages_of(kv, row) for row in rows]
    rows[1].token_ids = [0] * 1000
    assert not kv.grow_together(rows)
    assert [pages_of(kv, row) for row in rows] == before
    rows[1].token_ids = [0] * 3 * PAGE_SIZE
    rows[2].token_ids = [0] * 2 * PAGE_SIZE
    assert kv.grow_together(rows)
    assert [len(pages_of(kv, row)) for row in rows] == [1, 3, 2]
    assert len({page for row in rows for page in pages_of(kv, row)}) == 6
    check_integrity(kv)


def test_an_unknown_precision_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match="no KV cache for m/fp32; this engine has: m/bf16, m/int8, m/int4"):
        manager(2).grow(request("fp32"), 1)


def test_a_class_can_be_added_later():
    kv = manager(2)
    kv.register(FP32)
    assert kv.grow(request("fp32"), 1)
    check_integrity(kv)


def test_the_integrity_check_finds_pages_that_are_held_wrongly_lost_or_made_up():
    kv, first, second = manager(6), request("int8"), request("int8")
    assert kv.grow(first, 9)
    assert kv.grow(second, 9)
    check_integrity(kv)
    own = kv.holds(first).groups[0].runs[0].handles
    lost = own.pop()
    with pytest.raises(IntegrityError, match=f"reference count of page {lost}: 1 in the books, 0 counted"):
        check_integrity(kv)
    own.append(other := kv.holds(second).groups[0].runs[0].handles[0])
    with pytest.raises(IntegrityError, match=rf"reference count of page ({lost}|{other})"):
        check_integrity(kv)
    own[-1] = lost
    check_integrity(kv)
    unit = kv.pool.table.units[lost]
    kv.pool.table.units[lost] = 1
    with pytest.raises(IntegrityError, match="page 1 of m/int8 has a handle but is not allocated"):
        check_integrity(kv)
    kv.pool.table.units[lost] = kv.pool.table.units[own[0]]
    with pytest.raises(IntegrityError, match="has two handles"):
        check_integrity(kv)
    kv.pool.table.units[lost] = unit
    check_integrity(kv)


def admit(kv: KVManager, kv_precision: str, tokens: list[int], **options) -> Request:
    """A request that holds pages for its tokens."""
    times = RequestTimes(arrival_s=0.0)
    new = Request("r", "m", kv_precision, SamplingParams(), tokens, len(tokens), 10_000, 0, times, **options)
    assert kv.grow(new, len(tokens))
    return new


def compute(kv: KVManager, request: Request) -> None:
    request.num_computed_tokens = request.num_tokens
    kv.note_computed(request)


def test_who_takes_over_a_page_that_is_not_ready_writes_to_none_that_is():
    kv, prompt = manager(20), list(range(3 * PAGE_SIZE + 1))
    first = admit(kv, "bf16", prompt, min_kv_precision="int8")
    compute(kv, first)
    what = kv.next_requantization(first, most=1, keep_pages=2)
    assert what is not None
    assert kv.requantize_pages(first, what) == 1
    kv.release(first)  # what is left of it in the cache begins with its second page
    writer, other = admit(kv, "bf16", prompt), admit(kv, "bf16", prompt)
    assert not kv.can_advance(other)
    kv.release(writer)
    assert kv.can_advance(other)
    assert other.num_computed_tokens == 0
    for page in range(3):
        block = kv.pool.prefix_cache.by_handle.get(kv.held[other].groups[0].page(page)[1])
        assert block is None or not block.ready


def test_the_page_of_a_prompts_last_token_is_written_by_its_request_alone():
    """A prompt fills its last page, which a longer one begins with, too; both wait for a third, which goes away."""
    kv, prompt = manager(20), list(range(2 * PAGE_SIZE + 1))
    first = admit(kv, "bf16", prompt[: PAGE_SIZE + 1])
    full, longer = admit(kv, "bf16", prompt[:-1]), admit(kv, "bf16", prompt)
    assert not kv.can_advance(full)
    kv.release(first)
    assert kv.can_advance(longer)
    compute(kv, longer)
    assert kv.can_advance(full)
    assert full.num_computed_tokens == PAGE_SIZE
    assert kv.page_unit(full, 0) == kv.page_unit(longer, 0)
    assert kv.page_unit(full, 1) != kv.page_unit(longer, 1)
    assert kv.held[full].groups[0].page(1)[1] not in kv.pool.prefix_cache.by_handle


def test_nobody_takes_over_what_another_computes_without_waiting():
    """The third block is cached by a request that shares the first, but has a second one of its own."""
    kv, prompt = manager(20), list(range(3 * PAGE_SIZE + 1))
    compute(kv, old := admit(kv, "bf16", prompt[: 2 * PAGE_SIZE + 1]))
    (first, second) = (kv.held[old].groups[0].page(page)[1] for page in (0, 1))
    kv.release(old)
    kv.pool._evict([first])
    short = admit(kv, "bf16", prompt[: PAGE_SIZE + 1])
    other = admit(kv, "bf16", prompt)
    kv.pool._evict([second])
    middle, last = admit(kv, "bf16", prompt[: 2 * PAGE_SIZE + 1]), admit(kv, "bf16", prompt)
    assert kv.page_unit(other, 0) == kv.page_unit(last, 0)
    assert kv.page_unit(other, 1) != kv.page_unit(middle, 1) == kv.page_unit(last, 1)
    assert kv.page_unit(other, 2) != kv.page_unit(last, 2)
    kv.release(short)
    assert kv.can_advance(last)
    assert not kv.can_advance(other)


def test_pages_behind_a_window_go_back_and_none_that_are_attended_to():
    local = dataclasses.replace(INT8, group=1, window=6, span=6 + 2 * PAGE_SIZE)
    whole = dataclasses.replace(INT8, others=(local,))
    kv = KVManager(arena(40, classes=()), {("m", "int8"): whole})
    row = admit(kv, "int8", list(range(6 * PAGE_SIZE)))
    held = kv.holds(row).groups
    assert [group.num_pages for group in held] == [6, 2], "for what a step computes"
    for pages, dropped in ((2, 0), (4, 2), (6, 4)):
        row.num_computed_tokens = pages * PAGE_SIZE
        kv.note_computed(row)
        assert kv.grow(row, row.num_tokens)
        check_integrity(kv)
        assert (held[0].num_dropped, held[1].num_dropped) == (0, dropped)
    assert [segment.first_position for segment in kv.segments(row, 6 * PAGE_SIZE, 1)] == [4 * PAGE_SIZE]
    assert whole.demand(1000) == {whole: 250, local: 4}
    kv.pool.decref(held[1].drop(5))
    with pytest.raises(IntegrityError, match=r"5 pages of m/int8 \(group 1\) are dropped, but those from page 4 on"):
        check_integrity(kv)


def test_scattered_evictable_pages_do_not_keep_out_a_request_that_has_no_other_in_its_way():
    kv = manager(6)
    rows = [admit(kv, "int8", [i] * (PAGE_SIZE + 1), shares_prefix=i % 3 == 0) for i in range(12)]
    for row in rows:
        compute(kv, row)
        kv.release(row)
    evictable = kv.pool.table.units_of(list(kv.pool.prefix_cache.evictable))
    assert len({unit // kv.pool.allocator.slab_units for unit in evictable}) > 2
    kv.pool.compaction.max_step_bytes = 0
    most = kv.max_tokens_alone("m", "bf16")
    assert kv.grow(request("bf16"), most, leaving={})


def test_the_prefix_cache_is_checked_page_by_page_only_if_the_check_is_thorough():
    kv = manager(6)
    compute(kv, row := admit(kv, "int8", list(range(2 * PAGE_SIZE + 1))))
    kv.release(row)
    check_integrity(kv)
    handle = next(iter(kv.pool.prefix_cache.evictable))
    kv.pool.prefix_cache.by_handle[handle].ready = False
    check_integrity(kv, thorough=False)
    with pytest.raises(IntegrityError, match="evictable pages that are not ready"):
        check_integrity(kv)
    del kv.pool.prefix_cache.evictable[handle]
    with pytest.raises(IntegrityError, match="not kept for their prefix"):
        check_integrity(kv, thorough=False)
