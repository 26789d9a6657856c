"""The Triton attention kernel, interpreted on a CPU, equals textbook attention in float64 over what pages stand for.

Arenas are written here word by word from the layout that `geometry` documents. Whatever no query may see is NaN.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.pallas_kernels.bases import Bases
from fineserve_jax.pallas_kernels.formats import FORMATS, Aux, get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.spec import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun
from fineserve_jax.pallas_kernels.triton.attention import attend_pages

NAN_WORD = 0xFFFF  # NaN as bf16, fp16, half of an fp32, and as any scale
LAYERS = 2


def geometry(kv_heads: int, head_dim: int, page_size: int) -> PageGeometry:
    return PageGeometry(LAYERS, kv_heads, head_dim, page_size, choose_unit_words(head_dim, page_size))


# -- cached tokens -----------------------------------------------------------------------------------------


# Programs run once or twice: compiling them takes longer than running them badly.
jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


@jit
def encode(kv_format, k, v):
    """The words of pages f32[..., T, head_dim], and the keys and values they stand for."""
    words = kv_format.encode_vectors(k, v)
    return words, kv_format.decode_vectors(words)


class Cache:
    """An arena of NaN, where cached tokens lie in pages at random places."""

    def __init__(self, spec: AttentionSpec, seed: int, max_segments: int) -> None:
        self.spec, self.rng = spec, np.random.default_rng(seed)
        self.page_units = max(f.page_units(spec.geometry) for f in spec.formats)
        places = 1 + max_segments * spec.max_pages  # the first is the null page
        self.places = list(self.rng.permutation(np.arange(1, places)) * self.page_units)
        self.arena = np.full((places * self.page_units, spec.geometry.unit_words), NAN_WORD, np.uint16)
        self.segments: list[BatchSegment] = []
        self.kept: list[tuple[int, np.ndarray, np.ndarray, np.ndarray]] = []  # row, positions, k and v

    def add(self, row: int, name: str, num_tokens: int, first_position: int) -> None:
        geometry, kv_format = self.spec.geometry, get_format(name)
        shape = (LAYERS, geometry.kv_heads, self.spec.max_pages, geometry.page_size, geometry.head_dim)
        words, stands_for = encode(kv_format, *(self.rng.standard_normal(shape, np.float32) for _ in "kv"))
        words = jax.tree.map(np.array, words)
        pages = [int(self.places.pop()) for _ in range(-(-num_tokens // geometry.page_size))]
        for index, page in enumerate(pages):
            self._write_page(kv_format, words, index, page, num_tokens - index * geometry.page_size)
        self.segments.append(BatchSegment(row, self.spec.formats.index(kv_format), pages, num_tokens, first_position))
        flat = (*shape[:2], -1, geometry.head_dim)
        k, v = (np.asarray(part, np.float64).reshape(flat)[:, :, :num_tokens] for part in stands_for)
        self.kept.append((row, first_position + np.arange(num_tokens), k, v))

    def _write_page(self, kv_format, words, index: int, page: int, count: int) -> None:
        """Writes one page; what lies behind its `count` tokens stays NaN where the format is token-wise."""
        geometry = self.spec.geometry
        flat, whole = self.arena.reshape(-1), kv_format.tail is not None
        tokens = geometry.page_size if whole else min(count, geometry.page_size)
        width, vector = kv_format.width(geometry), kv_format.vector_words(geometry)
        for layer in range(LAYERS):
            start = (page + layer * kv_format.units_per_layer(geometry)) * geometry.unit_words
            for head in range(geometry.kv_heads):
                for which, parts in enumerate((words.k, words.v)):
                    block = start + (which * geometry.kv_heads + head) * kv_format.block_words(geometry)
                    for part, values in enumerate(parts):
                        for token in range(tokens):
                            first = block + token * vector + part * width
                            flat[first : first + width] = values[layer, head, index, token]
                aux = zip(
                    kv_format.aux,
                    kv_format.aux_starts(geometry),
                    kv_format.aux_sizes(geometry),
                    words.aux,
                    strict=True,
                )
                for kind, aux_start, size, values in aux:
                    first = start + aux_start + head * size
                    numbers = values[layer, head, index].reshape(-1)
                    numbers = numbers[:tokens] if kind is Aux.TOKEN else numbers
                    flat[first : first + len(numbers)] = numbers

    def of(self, row: int, layer: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The row's cached tokens in a layer: positions [N], k and v float64[kv_heads, N, head_dim]."""
        geometry = self.spec.geometry
        nothing = np.zeros((geometry.kv_heads, 0, geometry.head_dim))
        own = [(positions, k[layer], v[layer]) for of_row, positions, k, v in self.kept if of_row == row]
        positions = np.concatenate([np.zeros(0, int), *(part[0] for part in own)])
        return (positions, *(np.concatenate([nothing, *(part[i] for part in own)], axis=1) for i in (1, 2)))


def exact_attention(spec, q, position, positions, k, v):
    """Textbook attention in float64 of q [kv_heads, group, D]; output, and the log of the sum of exponentials."""
    seen = positions <= position
    if spec.window is not None:
        seen &= position - positions < spec.window
    if not seen.any():
        return np.zeros(q.shape), np.full(q.shape[:2], -np.inf)
    logits = np.einsum("hgd,htd->hgt", q, k[:, seen])
    if spec.soft_cap is not None:
        logits = spec.soft_cap * np.tanh(logits / spec.soft_cap)
    peak = logits.max(-1, keepdims=True)
    weights = np.exp(logits - peak)
    total = weights.sum(-1, keepdims=True)
    return np.einsum("hgt,htd->hgd", weights / total, v[:, seen]), (peak + np.log(total))[..., 0]


@jit
def attend(spec, q, arena, tiles, layer):
    seen = attend_pages(spec, q, arena, tiles, layer)
    return seen.output(), seen.log_sum_exp


def relative_error(result: np.ndarray, expected: np.ndarray) -> float:
    norm = np.linalg.norm(expected)
    return float(np.linalg.norm(result - expected) / norm) if norm else float(np.linalg.norm(result))


def check(spec, group, segments, runs, seed, dtype=jnp.float32) -> None:
    """Attention of the runs' queries to the segments (row, format, tokens, first position), against the oracle."""
    cache = Cache(spec, seed, max_segments=max(1, spec.num_rows * spec.segments_per_row))
    for segment in segments:
        cache.add(*segment)
    shape = (spec.tile_shape.num_queries, spec.geometry.kv_heads, group, spec.geometry.head_dim)
    q = jnp.asarray(cache.rng.standard_normal(shape, np.float32) * 2 / spec.geometry.head_dim**0.5, dtype)
    cache.rng.shuffle(cache.segments)
    tiles = spec.plan(cache.segments, runs)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    for layer in range(LAYERS):
        output, log_sum = map(np.asarray, attend(spec, q, cache.arena, tiles, jnp.int32(layer)))
        expected, expected_sum = np.zeros(shape), np.full(shape[:3], -np.inf)
        for row, run in enumerate(runs):
            cached = cache.of(row, layer)
            for i in range(run.num_queries):
                slot = run.first_slot + i
                exact = exact_attention(spec, np.asarray(q[slot], np.float64), run.first_position + i, *cached)
                expected[slot], expected_sum[slot] = exact
        assert relative_error(output, expected) < tolerance
        assert np.array_equal(np.isfinite(log_sum), np.isfinite(expected_sum))
        finite = np.isfinite(expected_sum)
        assert relative_error(log_sum[finite], expected_sum[finite]) < tolerance


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
            segments.append((row, draw(st.sampled_from(spec.formats)).name, num_tokens, position))
            position += num_tokens
        totals.append(position)
    return segments, totals, draw(st.integers(0, 2**32 - 1))


@settings(max_examples=8, deadline=None)
@given(batches(DECODE))
def test_decoding_rows_of_all_formats_in_one_batch(batch):
    segments, totals, seed = batch
    check(DECODE, 3, segments, decode_runs(totals), seed)


def test_long_rows_take_several_tiles_of_several_formats():
    spec = dataclasses.replace(DECODE, formats=SOME, num_rows=2, max_pages=70, window=1000, soft_cap=1.5)
    segments = [(0, "int4", 1040, 0), (0, "bf16", 77, 1040), (1, "int8", 1120, 0)]
    check(spec, 1, segments, decode_runs([1117, 1120]), seed=1)


def test_bfloat16_queries():
    spec = dataclasses.replace(DECODE, formats=SOME)
    segments = [(row, SOME[row % 3].name, 17 + 11 * row, 0) for row in range(6)]
    check(spec, 3, segments, decode_runs([17 + 11 * row for row in range(6)]), seed=2, dtype=jnp.bfloat16)


@pytest.mark.parametrize(("kv_heads", "head_dim", "page_size"), [(3, 96, 32), (1, 256, 128), (1, 32, 64)])
def test_geometries(kv_heads, head_dim, page_size):
    """Widths that are no power of two or less than a product contracts; pages of several chunks."""
    pages = geometry(kv_heads, head_dim, page_size)
    spec = AttentionSpec(pages, SOME[1:], 2, max_pages=2, implementation="triton", interpret=True)
    counts = [page_size + 1, 2 * page_size]
    check(spec, 4, [(row, f.name, counts[row], 0) for row, f in enumerate(SOME[1:])], decode_runs(counts), seed=3)


# -- many queries a row ------------------------------------------------------------------------------------

RAGGED = dataclasses.replace(DECODE, formats=SOME, num_rows=4, num_queries=64, window=60)


def test_rows_with_any_number_of_queries():
    """A prefill chunk of two blocks, a decode, a row without queries and a first chunk with nothing cached.

    A block's 32 queries of 3 heads each are more rows than one program takes.
    """
    runs = [QueryRun(3, 40, 90), QueryRun(43, 1, 33), QueryRun(44, 0, 20), QueryRun(50, 9, 0)]
    segments = [(0, "int4", 48, 0), (0, "bf16", 42, 48), (1, "int8", 33, 0), (2, "bf16", 20, 0)]
    check(RAGGED, 3, segments, runs, seed=4)


def test_queries_do_not_see_later_cached_keys():
    """Queries in the middle of what is cached: causality cuts inside a chunk."""
    runs = [QueryRun(0, 33, 5), QueryRun(33, 8, 70), QueryRun(41, 16, 0), QueryRun(60, 4, 79)]
    segments = [(0, "bf16", 80, 0), (1, "int8", 80, 0), (2, "int4", 64, 0), (3, "int8", 80, 0)]
    check(RAGGED, 3, segments, runs, seed=5)


# -- bases -------------------------------------------------------------------------------------------------


def test_formats_with_the_same_rotation_share_a_basis():
    bases = Bases((get_format("bf16"), get_format("int4"), get_format("int8"), get_format("int4")), 64)
    assert bases.index == (0, 1, 0, 1)
    vectors = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64), np.float32))
    rotated = bases.rotate(vectors)
    assert rotated.shape == (2, 3, 64)
    for basis in range(len(bases)):
        np.testing.assert_allclose(bases.restore(rotated[basis], basis), vectors, atol=1e-5)
