"""The Mosaic attention kernel, in TPU interpret mode on a CPU, equals textbook attention in float64."""

import dataclasses
import functools
from collections.abc import Iterable

import jax.numpy as jnp
import pytest
from attention_cases import LAYERS, Segment
from attention_cases import check as check_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ALL_FORMATS, make_geometry

from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.pallas_kernels.geometry import TPU_TILE, PageGeometry
from fineserve_jax.pallas_kernels.mosaic_tpu.attention_launch import attend_pages, plan_launch
from fineserve_jax.pallas_kernels.operations import plan_attention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import QueryRun

geometry_of = functools.partial(make_geometry, num_layers=LAYERS, tpu=True)
# One layer, but the first: interpreting is slow.
check = functools.partial(check_attention, layers=[LAYERS - 1])


def spec_of(geometry: PageGeometry, names: Iterable[str], num_rows: int, **more) -> AttentionSpec:
    formats = tuple(ALL_FORMATS[name] for name in names)
    fixed = {"max_pages": 4, "segments_per_row": 2, "implementation": "mosaic_tpu", "interpret": True} | more
    return AttentionSpec(geometry, formats, num_rows, **fixed)


def in_sequence(rows: list[list[tuple[str, int]]]) -> tuple[list[Segment], list[QueryRun]]:
    """Each row's segments (format, tokens) one behind the other, then its query."""
    segments, runs = [], []
    for row, own in enumerate(rows):
        position = 0
        for name, num_tokens in own:
            segments.append(Segment(row, name, num_tokens, position))
            position += num_tokens
        runs.append(QueryRun(row, 1, position))
    return segments, runs


# -- decoding ----------------------------------------------------------------------------------------------

# A step reads 8 pages of 16 tokens: the longest segments take two.
MIXED = spec_of(geometry_of(kv_heads=3, head_dim=64, page_size=16), FORMATS, num_rows=6, max_pages=10)


@st.composite
def mixed_rows(draw):
    """Rows of up to two segments of any formats and lengths, those around page boundaries above all."""
    lengths = st.one_of(st.sampled_from([0, 1, 15, 16, 17, 128, 129, 160]), st.integers(0, 160))
    segment = st.tuples(st.sampled_from(list(FORMATS)), lengths)
    return draw(st.lists(st.lists(segment, max_size=2), min_size=MIXED.num_rows, max_size=MIXED.num_rows))


@settings(max_examples=6)
@given(mixed_rows())
def test_rows_of_all_formats_in_one_batch(rows):
    check(MIXED, 3, *in_sequence(rows))


def test_every_length_around_page_boundaries():
    lengths = [1, 15, 16, 17, 128, 129]
    check(MIXED, 3, *in_sequence([[(name, length)] for name, length in zip(FORMATS, lengths, strict=True)]))


@pytest.mark.parametrize(
    ("geometry", "group", "name"),
    [
        pytest.param(geometry_of(3, 96, 32), 2, "int4", id="vectors that straddle rows"),
        pytest.param(geometry_of(1, 256, 128), 1, "bf16", id="vectors longer than a row"),
        pytest.param(geometry_of(1, 32, 16), 5, "int2", id="heads shorter than a row"),
    ],
)
def test_geometries(geometry, group, name):
    spec, size = spec_of(geometry, [name], num_rows=2, max_pages=3), geometry.page_size
    check(spec, group, *in_sequence([[(name, 2 * size + 5), (name, size)], [(name, size - 1), (name, 3 * size)]]))


def test_queries_in_bf16():
    spec = spec_of(geometry_of(8, 128, 16), ("bf16", "int8"), num_rows=3)
    rows = [[("int8", 48), ("bf16", 9)], [("int8", 50)], [("bf16", 64)]]
    check(spec, 4, *in_sequence(rows), dtype=jnp.bfloat16)


# -- many queries a row ------------------------------------------------------------------------------------


def test_rows_with_any_number_of_queries_in_blocks_of_heads():
    """A prefill chunk of two blocks, a decode, a row without queries, and queries in the middle of what is cached."""
    geometry = geometry_of(kv_heads=4, head_dim=128, page_size=16)
    spec = spec_of(geometry, ["int4"], 4, num_queries=64, max_pages=8, window=60, soft_cap=1.5)
    (layout,) = plan_launch(spec, 4, jnp.float32).formats
    assert layout.keys.num_head_blocks > 1
    segments = [
        Segment(0, "int4", 112),
        Segment(0, "int4", 5, 112),
        Segment(1, "int4", 33),
        Segment(2, "int4", 20),
        Segment(3, "int4", 128),
    ]
    runs = [QueryRun(0, 40, 117), QueryRun(40, 1, 33), QueryRun(41, 0, 20), QueryRun(45, 9, 70)]
    check(spec, 4, segments, runs)


# -- what cannot be ----------------------------------------------------------------------------------------


def test_an_arena_that_a_tpu_cannot_copy_is_refused():
    narrow = dataclasses.replace(MIXED, geometry=dataclasses.replace(MIXED.geometry, unit_words=128))
    with pytest.raises(ValueError, match=r"units of 128 words.*unit_words=1024"):
        attend_pages(
            narrow,
            jnp.zeros((6, 3, 1, 64)),
            jnp.zeros((1, 128), jnp.uint16),
            plan_attention(narrow, [], []),
            jnp.int32(0),
        )


def test_page_tables_longer_than_scalar_memory_are_refused():
    large = dataclasses.replace(MIXED, max_pages=1 << 16)
    arena = jnp.zeros((1, *TPU_TILE), jnp.uint16)
    with pytest.raises(ValueError, match="page tables of 12 segments of 65536 pages take 3145728 bytes"):
        attend_pages(large, jnp.zeros((6, 3, 1, 64)), arena, plan_attention(large, [], []), jnp.int32(0))
