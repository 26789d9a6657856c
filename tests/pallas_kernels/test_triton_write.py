"""The Triton kernels that write, interpreted on a CPU, leave the same arena as XLA's writes."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ALL_FORMATS, FAR_AWAY, make_geometry
from write_cases import (
    KERNEL_PAGES,
    ROTATING,
    SAME_ROTATION,
    TOKEN_FORMATS,
    Arena,
    Requantized,
    check_bf16_nearly_equal,
    check_equal,
    check_nearly_equal,
    check_write_pages,
    check_write_tokens,
    format_cases,
    pair_cases,
)

from fineserve_jax.pallas_kernels.formats import get_format

GEOMETRIES = [
    make_geometry(kv_heads=3, head_dim=96, page_size=32),
    make_geometry(kv_heads=3, head_dim=64),
    make_geometry(kv_heads=2, head_dim=128, page_size=32),
]
EXAMPLES = Arena(GEOMETRIES[1])


@format_cases(list(ALL_FORMATS.values()), GEOMETRIES)
def test_pages(kv_format, geometry):
    check_write_pages("triton", kv_format, geometry)


@format_cases(TOKEN_FORMATS, GEOMETRIES)
def test_tokens(kv_format, geometry):
    check_write_tokens("triton", kv_format, geometry)


def test_tokens_of_one_page():
    page = int(EXAMPLES.places[3])
    check_write_tokens("triton", get_format("int8"), GEOMETRIES[1], [page] * KERNEL_PAGES, [4, 0, 15, 7, 1, 2])


@settings(max_examples=20)
@given(
    pages=st.lists(
        st.one_of(st.sampled_from(EXAMPLES.places.tolist()), st.sampled_from([len(EXAMPLES), FAR_AWAY])),
        min_size=KERNEL_PAGES,
        max_size=KERNEL_PAGES,
        unique_by=lambda page: page if page < len(EXAMPLES) else object(),
    ),
    offsets=st.lists(st.integers(0, 15), min_size=KERNEL_PAGES, max_size=KERNEL_PAGES),
)
def test_tokens_at_any_place_of_any_pages(pages, offsets):
    check_write_tokens("triton", get_format("int8"), GEOMETRIES[1], pages, offsets)


@pair_cases(SAME_ROTATION, GEOMETRIES)
def test_pages_change_format(source, target, geometry):
    check_equal(Requantized("triton", source, target, geometry))


@pair_cases(ROTATING, GEOMETRIES)
def test_pages_change_format_and_rotation(source, target, geometry):
    check_nearly_equal(Requantized("triton", source, target, geometry), min(codec.value_bits for codec in target.sides))


def test_pages_leave_a_rotation():
    check_bf16_nearly_equal(Requantized("triton", get_format("int4"), get_format("bf16"), GEOMETRIES[0]))


@pytest.mark.parametrize("count", [0, 1, 3])
def test_only_so_many_pages_change_format(count):
    check_equal(Requantized("triton", get_format("bf16"), get_format("int8"), GEOMETRIES[0], count))


def test_blocks_of_tokens_of_long_pages_change_format():
    """A page of 64 tokens of 128 channels takes more than one program."""
    geometry = make_geometry(kv_heads=1, head_dim=128, page_size=64)
    check_equal(Requantized("triton", get_format("bf16"), get_format("int8"), geometry))
