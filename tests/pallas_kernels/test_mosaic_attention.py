"""The Mosaic attention kernel, in TPU interpret mode on a CPU, equals textbook attention in float64.

Arenas are written here word by word from the layout that `geometry` documents. Whatever no query may see is NaN.
"""

import dataclasses
import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ALL_FORMATS, exact_attention

from fineserve_jax.pallas_kernels.attention import paged_attention
from fineserve_jax.pallas_kernels.formats import FORMATS, Aux, KVFormat
from fineserve_jax.pallas_kernels.geometry import TPU_TILE, PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.mosaic_tpu.attention import attend_pages, plan_launch
from fineserve_jax.pallas_kernels.spec import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun

NAN_WORD = 0xFFFF
LAYERS = 2
F32_TOLERANCE, BF16_TOLERANCE = 1e-5, 1e-2


class Segment(NamedTuple):
    """Cached tokens of a row, in a format, from a position on."""

    row: int
    name: str
    num_tokens: int
    first_position: int = 0


# -- cached tokens -----------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def encode(kv_format, k, v):
    """The words of pages f32[..., T, head_dim], and the keys and values they stand for."""
    words = kv_format.encode_vectors(k, v)
    return words, kv_format.decode_vectors(words)


def page_layer(kv_format: KVFormat, geometry: PageGeometry, words, num_tokens: int) -> np.ndarray:
    """A layer of a page, u16; `words` are [kv_heads, ...]. Token-wise formats have NaN behind the last token."""
    tokens = geometry.page_size if kv_format.tail else min(num_tokens, geometry.page_size)
    flat = np.full(kv_format.units_per_layer(geometry) * geometry.unit_words, NAN_WORD, np.uint16)
    shape = (2, geometry.kv_heads, geometry.page_size, kv_format.vector_words(geometry))
    values = flat[: np.prod(shape)].reshape(shape)
    for which, parts in enumerate((words.k, words.v)):
        values[which, :, :tokens] = np.concatenate(parts, axis=-1)[:, :tokens]
    starts, sizes = kv_format.aux_starts(geometry), kv_format.aux_sizes(geometry)
    for kind, start, size, part in zip(kv_format.aux, starts, sizes, words.aux, strict=True):
        count = tokens if kind is Aux.TOKEN else size
        own = flat[start : start + geometry.kv_heads * size].reshape(geometry.kv_heads, size)
        own[:, :count] = part.reshape(geometry.kv_heads, size)[:, :count]
    return flat


class Cache:
    """An arena of NaN, where segments lie in pages at random places; `kept[row]` is what they stand for."""

    def __init__(self, spec: AttentionSpec, segments: list[Segment], rng: np.random.Generator) -> None:
        geometry = spec.geometry
        longest = max(kv_format.page_units(geometry) for kv_format in spec.formats)
        num_pages = [-(-segment.num_tokens // geometry.page_size) for segment in segments]
        # As many as there can be, since a program is compiled for each size of arena.
        places = list((1 + rng.permutation(spec.num_rows * spec.segments_per_row * spec.max_pages)) * longest)
        self.arena = np.full(((1 + len(places)) * longest, *geometry.unit_shape), NAN_WORD, np.uint16)
        self.segments: list[BatchSegment] = []
        self.kept: list[list[tuple[np.ndarray, ...]]] = [[] for _ in range(spec.num_rows)]
        for segment, count in zip(segments, num_pages, strict=True):
            pages = [int(places.pop()) for _ in range(count)]
            self._write(spec, segment, pages, rng)

    def _write(self, spec: AttentionSpec, segment: Segment, pages: list[int], rng: np.random.Generator) -> None:
        geometry, kv_format = spec.geometry, ALL_FORMATS[segment.name]
        # Always as many pages, so that few programs are compiled.
        shape = (LAYERS, geometry.kv_heads, spec.max_pages, geometry.page_size, geometry.head_dim)
        words, decoded = encode(kv_format, *(rng.standard_normal(shape, np.float32) for _ in "kv"))
        words = jax.tree.map(np.asarray, words)
        units = kv_format.units_per_layer(geometry)
        for index, page in enumerate(pages):
            for layer in range(LAYERS):
                own = jax.tree.map(lambda part: part[layer, :, index], words)  # noqa: B023
                flat = page_layer(kv_format, geometry, own, segment.num_tokens - index * geometry.page_size)
                first = page + layer * units
                self.arena[first : first + units] = flat.reshape(units, *geometry.unit_shape)
        k, v = (np.asarray(part, np.float64).reshape(*shape[:2], -1, shape[-1]) for part in decoded)
        positions = segment.first_position + np.arange(segment.num_tokens)
        self.kept[segment.row].append((positions, k[:, :, : len(positions)], v[:, :, : len(positions)]))
        format_id = spec.formats.index(kv_format)
        self.segments.append(BatchSegment(segment.row, format_id, pages, segment.num_tokens, segment.first_position))

    def of(self, row: int, layer: int, geometry: PageGeometry) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Positions [tokens], and float64 k and v [kv_heads, tokens, D]."""
        nothing = np.zeros((LAYERS, geometry.kv_heads, 0, geometry.head_dim))
        positions, k, v = zip((np.zeros(0, int), nothing, nothing), *self.kept[row], strict=True)
        return np.concatenate(positions), *(np.concatenate(part, axis=2)[layer] for part in (k, v))


# -- against the oracle ------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def attend(spec, q, arena, tiles, layer):
    seen = paged_attention(spec, q, arena, tiles, layer)
    return seen.output(), seen.log_sum_exp


def check(spec: AttentionSpec, group: int, segments: list[Segment], runs: list[QueryRun], dtype=jnp.float32) -> None:
    """Queries of rows of a batch, and NaN where no query is."""
    geometry, rng = spec.geometry, np.random.default_rng(len(segments))
    cache = Cache(spec, segments, rng)
    rng.shuffle(cache.segments)
    shape = (spec.tile_shape.num_queries, geometry.kv_heads, group, geometry.head_dim)
    q = np.full(shape, np.nan, np.float32)
    for run in runs:
        own = rng.standard_normal((run.num_queries, *shape[1:]), np.float32) * 2 / geometry.head_dim**0.5
        q[run.first_slot : run.first_slot + run.num_queries] = own
    q = np.asarray(jnp.asarray(q, dtype))
    layer = LAYERS - 1
    flat = (shape[0], -1, shape[-1])
    output, log_sum = attend(spec, q.reshape(flat), cache.arena, spec.plan(cache.segments, runs), layer)
    output, log_sum = np.asarray(output).reshape(shape), np.asarray(log_sum).reshape(shape[:3])
    expected, expected_log_sum = np.zeros(shape), np.full(shape[:3], -np.inf)
    for row, run in enumerate(runs):
        positions, k, v = cache.of(row, layer, geometry)
        slots = slice(run.first_slot, run.first_slot + run.num_queries)
        ahead = run.first_position + np.arange(run.num_queries)[:, None] - positions
        visible = (ahead >= 0) & (ahead < (np.inf if spec.window is None else spec.window))
        exact = exact_attention(q[slots].astype(np.float64), k, v, visible, spec.soft_cap)
        expected[slots], expected_log_sum[slots] = exact.output, exact.log_sum_exp
    tolerance = F32_TOLERANCE if dtype == jnp.float32 else BF16_TOLERANCE
    flat = (len(q), -1)
    error = np.linalg.norm((output - expected).reshape(flat), axis=-1)
    allowed = tolerance * np.linalg.norm(expected.reshape(flat), axis=-1)
    assert (error <= allowed).all(), (error / allowed.clip(1e-300)).max() * tolerance
    np.testing.assert_allclose(log_sum, expected_log_sum, rtol=tolerance, atol=tolerance)


def geometry_of(kv_heads: int, head_dim: int, page_size: int) -> PageGeometry:
    return PageGeometry(LAYERS, kv_heads, head_dim, page_size, choose_unit_words(head_dim, page_size, tpu=True))


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


@settings(max_examples=6, deadline=None)
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
    (rows,) = plan_launch(spec, 4, jnp.float32).formats
    assert rows.num_blocks > 1
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
            narrow, jnp.zeros((6, 3, 1, 64)), jnp.zeros((1, 128), jnp.uint16), narrow.plan([], []), jnp.int32(0)
        )


def test_page_tables_longer_than_scalar_memory_are_refused():
    large = dataclasses.replace(MIXED, max_pages=1 << 16)
    arena = jnp.zeros((1, *TPU_TILE), jnp.uint16)
    with pytest.raises(ValueError, match="page tables of 12 segments of 65536 pages take 3145728 bytes"):
        attend_pages(large, jnp.zeros((6, 3, 1, 64)), arena, large.plan([], []), jnp.int32(0))
