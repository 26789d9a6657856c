"""Decode attention over pages of many formats equals textbook attention over what the pages stand for."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    GEOMETRIES,
    PAGES,
    SMALL,
    TOKEN_FORMATS,
    TOLERANCE,
    Cache,
    decode_attention,
    exact_attention,
    relative_error,
)

from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.pallas_kernels.xla.tiles import TileShape

ROWS = 8
SHAPE = TileShape(num_rows=ROWS, max_pages=PAGES, rows=4, pages=2, num_formats=len(FORMATS), segments_per_row=2)


def lengths(page_size: int) -> st.SearchStrategy[int]:
    """Numbers of cached tokens, those around page boundaries above all."""
    near = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size, PAGES * page_size]
    return st.one_of(st.sampled_from(near), st.integers(0, PAGES * page_size))


@st.composite
def row_segments(draw, page_size: int) -> list[tuple[str, int]]:
    """A row's segments, no two in one format: (format, tokens)."""
    names = draw(st.permutations(list(FORMATS)))[: draw(st.integers(0, 2))]
    return [(name, draw(lengths(page_size))) for name in names]


def batches(page_size: int) -> st.SearchStrategy:
    return st.tuples(st.lists(row_segments(page_size), min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1))


def check(geometry, group: int, rows: list[list[tuple[str, int]]], seed: int, sharpness: float = 1.0) -> None:
    """Attention of a batch with these cached segments, in each layer, against the oracle."""
    rng = np.random.default_rng(seed)
    cache = Cache(geometry, rng)
    for row, segments in enumerate(rows):
        for name, num_tokens in segments:
            cache.add(row, name, num_tokens)
    heads = (ROWS, geometry.kv_heads)
    q = rng.standard_normal((*heads, group, geometry.head_dim), np.float32)
    q *= sharpness / geometry.head_dim**0.5
    k, v = (rng.standard_normal((*heads, geometry.head_dim), np.float32) for _ in "kv")
    tiles = cache.tiles(SHAPE)
    for layer in range(geometry.num_layers):
        output = np.asarray(decode_attention(q, k, v, cache.arena, tiles, layer, cache.formats, geometry))
        assert output.shape == q.shape
        for row in range(ROWS):
            cached = cache.of(row, layer)
            keys, values = (
                np.concatenate([old, new[row][:, None]], axis=1) for old, new in zip(cached, (k, v), strict=True)
            )
            assert relative_error(output[row], exact_attention(q[row], keys, values)) < TOLERANCE, rows[row]


@settings(max_examples=20, deadline=None)
@given(batches(SMALL.page_size))
def test_rows_of_all_formats_in_one_batch(batch):
    check(SMALL, 3, *batch)


@pytest.mark.parametrize(
    ("geometry", "group"), [(SMALL, 1), (GEOMETRIES[1], 4), (SMALL, 8)], ids=["1 of 64", "4 of 96", "8 of 64"]
)
def test_groups_of_query_heads_share_their_key_head(geometry, group):
    every, size = [[(name, 37)] for name in TOKEN_FORMATS], geometry.page_size
    int4 = [("int4", 3 * size), ("bf16", 5)]
    check(geometry, group, [*every, int4, [], [("int4", size)], [("bf16", 1)]], seed=group)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 33, 128])
def test_rows_end_anywhere_in_a_page(num_tokens):
    """In int4, full pages and a tail in bf16."""
    whole = num_tokens // 16 * 16
    int4 = [("int4", whole), ("bf16", num_tokens - whole)]
    check(SMALL, 3, [*([(name, num_tokens)] for name in TOKEN_FORMATS), int4, int4, []], seed=num_tokens)


def test_one_logit_far_above_the_others_does_not_overflow():
    check(SMALL, 3, [[("int8", 100)], [("int4", 64), ("bf16", 7)], *[[("fp32", 20)]] * 6], seed=5, sharpness=8)
