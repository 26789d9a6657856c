"""The Triton attention kernel, interpreted on a CPU, equals textbook attention in float64 over what pages stand for."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LAYERS, Segment, check
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import make_geometry

from fineserve_jax.pallas_kernels.formats import FORMATS, get_format
from fineserve_jax.pallas_kernels.rotations import Rotations
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import QueryRun

geometry = functools.partial(make_geometry, num_layers=LAYERS)


def decode_runs(positions: list[int]) -> list[QueryRun]:
    return [QueryRun(row, 1, position) for row, position in enumerate(positions)]


# -- decoding ----------------------------------------------------------------------------------------------

SMALL = geometry(kv_heads=2, head_dim=64, page_size=16)
ALL = tuple(FORMATS.values())
SOME = tuple(map(get_format, ("bf16", "int8", "int4")))  # compiling for every format takes seconds
DECODE = AttentionSpec(SMALL, ALL, num_rows=6, max_pages=5, segments_per_row=2, implementation="triton", interpret=True)


def lengths(spec: AttentionSpec) -> st.SearchStrategy[int]:
    """Numbers of cached tokens, those around page boundaries above all."""
    size, most = spec.geometry.page_size, spec.max_pages * spec.geometry.page_size
    return st.one_of(st.sampled_from([0, 1, size - 1, size, size + 1, most]), st.integers(0, most))


@st.composite
def batches(draw, spec: AttentionSpec):
    """Segments of every row, each following the one before it, and how many tokens each row has."""
    segments, totals = [], []
    for row in range(spec.num_rows):
        position = 0
        for _ in range(draw(st.integers(0, spec.segments_per_row))):
            num_tokens = draw(lengths(spec))
            segments.append(Segment(row, draw(st.sampled_from(spec.formats)).name, num_tokens, position))
            position += num_tokens
        totals.append(position)
    return segments, totals, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=8)
@given(batches(DECODE))
def test_decoding_rows_of_all_formats_in_one_batch(batch):
    segments, totals, seed = batch
    check(DECODE, 3, segments, decode_runs(totals), seed=seed)


def test_long_rows_take_several_tiles_of_several_formats():
    spec = dataclasses.replace(DECODE, formats=SOME, num_rows=2, max_pages=70, window=1000, soft_cap=1.5)
    segments = [Segment(0, "int4", 1040), Segment(0, "bf16", 77, 1040), Segment(1, "int8", 1120)]
    check(spec, 1, segments, decode_runs([1117, 1120]), seed=1)


def test_bfloat16_queries():
    spec = dataclasses.replace(DECODE, formats=SOME)
    segments = [Segment(row, SOME[row % 3].name, 17 + 11 * row) for row in range(6)]
    check(spec, 3, segments, decode_runs([17 + 11 * row for row in range(6)]), seed=2, dtype=jnp.bfloat16)


@pytest.mark.parametrize(("kv_heads", "head_dim", "page_size"), [(3, 96, 32), (1, 256, 128), (1, 32, 64)])
def test_geometries(kv_heads, head_dim, page_size):
    """Widths that are no power of two or less than a product contracts; pages of several chunks."""
    pages = geometry(kv_heads, head_dim, page_size)
    spec = AttentionSpec(pages, SOME[1:], 2, max_pages=2, implementation="triton", interpret=True)
    counts = [page_size + 1, 2 * page_size]
    segments = [Segment(row, kv_format.name, counts[row]) for row, kv_format in enumerate(SOME[1:])]
    check(spec, 4, segments, decode_runs(counts), seed=3)


# -- many queries a row ------------------------------------------------------------------------------------

RAGGED = dataclasses.replace(DECODE, formats=SOME, num_rows=4, num_queries=64, window=60)


def test_rows_with_any_number_of_queries():
    """A prefill chunk of two blocks, a decode, a row without queries and a first chunk with nothing cached.

    A block's 32 queries of 3 heads each are more rows than one program takes.
    """
    runs = [QueryRun(3, 40, 90), QueryRun(43, 1, 33), QueryRun(44, 0, 20), QueryRun(50, 9, 0)]
    segments = [Segment(0, "int4", 48), Segment(0, "bf16", 42, 48), Segment(1, "int8", 33), Segment(2, "bf16", 20)]
    check(RAGGED, 3, segments, runs, seed=4)


def test_queries_do_not_see_later_cached_keys():
    """Queries in the middle of what is cached: causality cuts inside a chunk."""
    runs = [QueryRun(0, 33, 5), QueryRun(33, 8, 70), QueryRun(41, 16, 0), QueryRun(60, 4, 79)]
    segments = [Segment(0, "bf16", 80), Segment(1, "int8", 80), Segment(2, "int4", 64), Segment(3, "int8", 80)]
    check(RAGGED, 3, segments, runs, seed=5)


# -- rotations ---------------------------------------------------------------------------------------------


def test_formats_with_the_same_rotation_share_it():
    names = ("bf16", "int4", "int8", "int4")
    rotations = Rotations([get_format(name).key for name in names], 64)
    assert rotations.of_codec == (0, 1, 0, 1)
    vectors = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64), np.float32))
    rotated = rotations.rotate(vectors)
    assert rotated.shape == (2, 3, 64)
    for number in range(len(rotations)):
        np.testing.assert_allclose(rotations.unrotate(rotated[number], number), vectors, atol=1e-5)
