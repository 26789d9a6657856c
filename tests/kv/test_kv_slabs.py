"""What the slab policies promise, by example, and what the allocator refuses."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_cases import BF16, FP32, INT4, INT8, OTHER_INT8, UNIT_BYTES, arena, page_class, snapshot

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.allocator import NULL_UNIT, SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import IntegrityError, PageError
from fineserve_jax.kv.integrity import check_allocator
from fineserve_jax.kv.policies import apportion
from fineserve_jax.kv.stats import allocator_stats

weights = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-3, 1e3), min_size=1)


def test_the_null_page_is_never_handed_out():
    allocator = arena(3)
    pages = allocator.allocate({INT4: allocator.allocatable(INT4)})
    assert pages is not None
    assert NULL_UNIT not in pages[INT4]
    assert min(pages[INT4]) >= allocator.slab_units


def test_the_fullest_slab_gives_the_next_page():
    allocator = arena(3)
    pages = allocator.allocate({INT8: 12})[INT8]
    by_slab = [pages[:4], pages[4:8], pages[8:]]
    assert [{page // 20 for page in slab} for slab in by_slab] == [{by_slab[i][0] // 20} for i in range(3)]
    for slab, free in zip(by_slab, (2, 1, 3), strict=True):
        allocator.free(INT8, slab[:free])
    taken = allocator.allocate({INT8: 6})[INT8]
    slabs = [slab[0] // 20 for slab in by_slab]
    assert [page // 20 for page in taken] == [slabs[1]] * 1 + [slabs[0]] * 2 + [slabs[2]] * 3


def test_no_page_begins_in_the_unused_end_of_a_slab():
    allocator = arena(2)
    pages = allocator.allocate({INT4: 12})[INT4]
    end = min(pages) + 6 * INT4.page_units
    assert end + 2 == min(page for page in pages if page > end)
    with pytest.raises(PageError, match=f"page {end} is not owned"):
        allocator.free(INT4, [end])


def test_elastic_slabs_change_precision_once_they_are_empty():
    allocator = arena(4)
    narrow = allocator.allocate({INT4: allocator.allocatable(INT4)})[INT4]
    assert not allocator.can_allocate({BF16: 1})
    allocator.free(INT4, narrow)
    assert allocator.allocatable(BF16) == 4 * (20 // BF16.page_units)


def test_a_format_cannot_outgrow_its_partition_while_slabs_are_free():
    allocator = arena(8, policy="partitioned", shares={"bf16": 2, "int8": 1, "int4": 1})
    quota = {page_class: allocator.allocatable(page_class) for page_class in (BF16, INT8, INT4)}
    assert quota == {BF16: 4 * 2, INT8: 2 * 4, INT4: 2 * 6}
    assert allocator.allocate({INT8: 9}) is None
    assert allocator.allocate(quota) is not None
    assert allocator_stats(allocator).free_slabs == 0


def test_partitions_are_equal_unless_shares_are_given():
    allocator = arena(9, policy="partitioned")
    assert [allocator.shares[name].limit for name in ("bf16", "int8", "int4")] == [3, 3, 3]


def test_a_later_format_gets_its_equal_share_as_the_others_shrink():
    allocator = arena(4, policy="partitioned", classes=(BF16, INT8))
    full = allocator.allocate({BF16: 4, INT8: 8})
    allocator.register(FP32)
    assert allocator.shares["fp32"].limit > 0
    assert allocator.allocatable(FP32) == 0
    assert allocator.allocate({FP32: 1}) is None
    allocator.free(INT8, full[INT8])
    assert allocator.allocatable(FP32) == allocator.shares["fp32"].limit
    assert allocator.allocatable(BF16) == 0


def test_a_residual_page_counts_against_the_share_of_its_own_format():
    allocator = arena(4, policy="partitioned", shares={"bf16": 1, "int4": 3}, classes=(INT4,))
    assert allocator.allocatable(BF16) == 20 // BF16.page_units
    assert not allocator.can_allocate({INT4: 1, BF16: 3})


def test_uniform_pages_take_as_many_units_as_the_longest_class_and_share_slabs():
    allocator = arena(2, policy="uniform")
    pages = allocator.allocate({INT4: 1, INT8: 1})
    assert {page // 20 for units in pages.values() for page in units} == {pages[INT4][0] // 20}
    assert abs(pages[INT4][0] - pages[INT8][0]) == BF16.page_units


def test_a_longer_class_widens_uniform_pages_only_before_one_is_handed_out():
    allocator = arena(2, policy="uniform")
    allocator.register(page_class("wide", 8))
    assert allocator.allocatable(INT4) == 2 * (20 // 8)
    page = allocator.allocate({INT4: 1})
    before = snapshot(allocator)
    with pytest.raises(ConfigError, match="takes 13 units a page, and pages of 8 are in use"):
        allocator.register(FP32)
    assert snapshot(allocator) == before
    allocator.free(INT4, page[INT4])
    allocator.register(FP32)
    assert allocator.allocatable(INT4) == 2


def test_a_request_for_several_classes_counts_their_slabs_together():
    allocator = arena(2)
    assert allocator.can_allocate({BF16: 2, INT8: 4})
    assert not allocator.can_allocate({BF16: 2, INT8: 4, INT4: 1})
    assert allocator.fits_empty({BF16: 4})
    assert allocator.allocate({INT8: 1}) is not None
    assert allocator.fits_empty({BF16: 4})
    assert not allocator.can_allocate({BF16: 4})


def test_registering_a_class_again_changes_nothing():
    allocator = arena(2)
    before = snapshot(allocator)
    allocator.register(dataclasses.replace(INT4))
    assert snapshot(allocator) == before


def test_stats_account_for_every_byte():
    allocator = SlabAllocator(20 * 4 + 5, 20, "elastic", (BF16, INT8), unit_bytes=UNIT_BYTES)
    allocator.allocate({BF16: 3, INT8: 1})
    stats = allocator_stats(allocator)
    assert stats.slab_bytes == 20 * UNIT_BYTES
    assert (stats.usable_slabs, stats.free_slabs) == (3, 0)
    assert stats.reserved_bytes == 3 * 20 * UNIT_BYTES
    assert stats.free_bytes == (1 * 7 + 3 * 5) * UNIT_BYTES
    bf16, int8 = stats.classes[BF16], stats.classes[INT8]
    assert (bf16.slabs, bf16.owned_pages, bf16.free_pages, bf16.allocatable_pages) == (2, 3, 1, 1)
    assert (bf16.reserved_bytes, bf16.free_bytes) == (2 * 20 * UNIT_BYTES, 7 * UNIT_BYTES)
    assert (int8.slabs, int8.owned_pages, int8.free_pages, int8.allocatable_pages) == (1, 1, 3, 3)


@given(total=st.integers(0, 10_000), shares=weights)
def test_apportioned_slabs_add_up_and_are_within_one_of_the_exact_share(total, shares):
    parts = apportion(total, shares)
    assert sum(parts.values()) == total
    for name, share in shares.items():
        assert abs(parts[name] - total * share / sum(shares.values())) < 1 + 1e-6


REFUSALS = {
    "unknown policy": (lambda: arena(2, policy="greedy"), "'greedy'.*elastic, partitioned, uniform"),
    "shares without partitions": (lambda: arena(2, shares={"bf16": 1.0}), "'elastic'; only 'partitioned'"),
    "a format without a share": (
        lambda: arena(2, policy="partitioned", shares={"int4": 1.0}, classes=(INT4,)),
        "shares for int4, none for bf16; add a share",
    ),
    "a share of nothing": (
        lambda: arena(2, policy="partitioned", shares={"bf16": 0.0}),
        "bf16=0.0: give a pos",
    ),
    "an endless share": (lambda: arena(2, policy="partitioned", shares={"bf16": float("inf")}), "bf16=inf"),
    "an arena of one slab": (lambda: arena(0), "20 units (160 bytes).*at least 320 bytes"),
    "slabs of no length": (lambda: arena(2, slab_units=0), "slab_units=0"),
    "too many units for a page table": (lambda: SlabAllocator(2**31, 20), "num_units=2147483648"),
    "a page longer than a slab": (
        lambda: arena(2, slab_units=6),
        "takes 7 units, a slab has 6; use slab_units=7",
    ),
    "two classes of a model and format": (
        lambda: arena(2, classes=(INT8, page_class("int8", 6))),
        "one class",
    ),
    "more bytes than units": (
        lambda: arena(2, classes=(PageClass("m", "bf16", 2, 4, 17),)),
        "page_bytes=17 do not fit in 2 units of 8 bytes (16)",
    ),
    "a page of no units": (lambda: page_class("bf16", 0), "page_units=0"),
    "a residual page with a residual page": (
        lambda: page_class("int2", 2, residual=INT4),
        "has a residual page itself",
    ),
    "a residual page of another model": (
        lambda: page_class("int4", 2, residual=OTHER_INT8),
        "'other'; it must hold 4 of 'm'",
    ),
    "an unknown class": (lambda: arena(2).allocate({FP32: 1}), "m/fp32 is no class .*register it first"),
    "too many classes": (
        lambda: arena(2, classes=[page_class(f"f{n}", 1) for n in range(256)]),
        "class 256 of the arena",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_bad_setting_is_refused_by_name(case):
    build, message = REFUSALS[case]
    with pytest.raises(ConfigError, match=re.escape(message).replace(r"\.\*", ".*")):
        build()


def test_a_negative_demand_is_refused():
    with pytest.raises(ValueError, match="-1 pages of m/int8"):
        arena(2).can_allocate({INT8: -1})


def swap_in_a_bound_slab(allocator, pages):
    allocator.free_slabs[0] = pages[INT8][0] // allocator.slab_units


def forget_a_page(allocator, pages):
    allocator.tags.rows[pages[INT8][0] // allocator.slab_units, 0] = 0


def give_a_page_to_another_class(allocator, pages):
    allocator.tags.rows[pages[INT8][0] // allocator.slab_units, 0] = allocator.member(BF16).tag


def own_the_null_page(allocator, pages):
    allocator.tags.rows[0, 0] = allocator.member(BF16).tag


def own_a_page_in_an_unused_end(allocator, pages):
    allocator.tags.rows[pages[BF16][0] // allocator.slab_units, 5] = allocator.member(BF16).tag


def miscount_free_pages(allocator, pages):
    allocator.member(INT8).pool.free_pages += 1


def miscount_owned_pages(allocator, pages):
    allocator.member(INT8).owned_pages += 1


def miscount_slabs(allocator, pages):
    allocator.member(INT8).pool.num_slabs -= 1


def miscount_a_share(allocator, pages):
    allocator.shares["arena"].bound -= 1


def misfile_a_slab(allocator, pages):
    pool = allocator.member(INT8).pool
    slab, free = pool.pop_fullest()
    pool.put(slab, free + 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (swap_in_a_bound_slab, "free slabs, with that of the null page"),
        (forget_a_page, "free pages of pool 2"),
        (give_a_page_to_another_class, "foreign pages"),
        (own_the_null_page, "free slabs with pages in use"),
        (own_a_page_in_an_unused_end, "pages in their unused ends"),
        (miscount_free_pages, "free pages of pool 2"),
        (miscount_owned_pages, "pages owned by m/int8"),
        (miscount_slabs, "slabs of pool 2"),
        (miscount_a_share, "share 'arena'"),
        (misfile_a_slab, "slabs by number of free pages of pool 2"),
    ],
)
def test_the_integrity_check_names_what_does_not_add_up(damage, message):
    allocator = arena(6)
    pages = allocator.allocate({BF16: 1, INT8: 2, INT4: 3})
    check_allocator(allocator)
    damage(allocator, pages)
    with pytest.raises(IntegrityError, match=message):
        check_allocator(allocator)
