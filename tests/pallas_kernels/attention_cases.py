"""What the tests of attention kernels share: arenas written word by word from the layout that `geometry` documents,
independently of what writes arenas elsewhere, and batches checked against textbook attention in float64.

Whatever no query may see is NaN.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from kernel_cases import ALL_FORMATS, NAN_WORD, Exact, exact_attention, relative_error

from fineserve_jax.pallas_kernels.formats import Granularity, KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.operations import paged_attention, plan_attention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun

LAYERS = 2
F32_TOLERANCE, BF16_TOLERANCE = 1e-5, 1e-2
# Programs run once or twice: compiling them takes longer than running them badly.
quick_jit = functools.partial(jax.jit, static_argnums=0, compiler_options={"xla_backend_optimization_level": 0})


class Segment(NamedTuple):
    """Cached tokens of a row, in a format, from a position on."""

    row: int
    name: str
    num_tokens: int
    first_position: int = 0


# -- cached tokens -----------------------------------------------------------------------------------------


@quick_jit
def encode(kv_format, k, v):
    """The words of pages f32[..., T, head_dim], and the keys and values they stand for."""
    words = kv_format.encode_vectors(k, v)
    return words, kv_format.decode_vectors(words)


def page_layer(kv_format: KVFormat, geometry: PageGeometry, words, num_tokens: int) -> np.ndarray:
    """A layer of a page, u16; `words` are [kv_heads, ...]. Token-wise formats have NaN behind the last token."""
    tokens = geometry.page_size if kv_format.residual else min(num_tokens, geometry.page_size)
    flat = np.full(kv_format.units_per_layer(geometry) * geometry.unit_words, NAN_WORD, np.uint16)
    starts = kv_format.block_starts(geometry), kv_format.scale_starts(geometry)
    for codec, side, start, scale_starts in zip(kv_format.sides, words, *starts, strict=True):
        shape = (geometry.kv_heads, geometry.page_size, codec.vector_words(geometry))
        values = flat[start : start + np.prod(shape)].reshape(shape)
        values[:, :tokens] = np.concatenate(side.words, axis=-1)[:, :tokens]
        arrays = zip(codec.scales, scale_starts, codec.scale_sizes(geometry), side.scales, strict=True)
        for kind, first, size, part in arrays:
            count = tokens if kind is Granularity.TOKEN else size
            own = flat[first : first + geometry.kv_heads * size].reshape(geometry.kv_heads, size)
            own[:, :count] = part.reshape(geometry.kv_heads, size)[:, :count]
    return flat


class Cache:
    """An arena of NaN, where segments lie in pages at random places; `kept[row]` is what they stand for."""

    def __init__(self, spec: AttentionSpec, segments: Sequence[Segment], rng: np.random.Generator) -> None:
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


@quick_jit
def attend(spec, q, arena, tiles, layer):
    seen = paged_attention(spec, q, arena, tiles, layer)
    return seen.output(), seen.log_sum_exp


def check(
    spec: AttentionSpec,
    group: int,
    segments: Sequence[Segment],
    runs: Sequence[QueryRun],
    *,
    seed: int = 0,
    dtype: jnp.dtype = jnp.float32,
    layers: Iterable[int] = range(LAYERS),
) -> None:
    """Attention of the runs' queries to the segments, against the oracle, query by query."""
    geometry, rng = spec.geometry, np.random.default_rng(seed)
    cache = Cache(spec, segments, rng)
    rng.shuffle(cache.segments)
    tiles = plan_attention(spec, cache.segments, runs)
    shape = (spec.query_axis_size, geometry.kv_heads, group, geometry.head_dim)
    q = np.full(shape, np.nan, np.float32)
    for run in runs:
        own = rng.standard_normal((run.num_queries, *shape[1:]), np.float32) * 2 / geometry.head_dim**0.5
        q[run.start : run.start + run.num_queries] = own
    q = np.asarray(jnp.asarray(q, dtype))
    tolerance = F32_TOLERANCE if dtype == jnp.float32 else BF16_TOLERANCE
    for layer in layers:
        output, log_sum = attend(spec, q.reshape(shape[0], -1, shape[-1]), cache.arena, tiles, jnp.int32(layer))
        found = Exact(np.asarray(output).reshape(shape), np.asarray(log_sum).reshape(shape[:3]))
        expected = Exact(np.zeros(shape), np.full(shape[:3], -np.inf))
        for row, run in enumerate(runs):
            slots = slice(run.start, run.start + run.num_queries)
            positions, k, v = cache.of(row, layer, geometry)
            ahead = run.first_position + np.arange(run.num_queries)[:, None] - positions
            visible = (ahead >= 0) & (ahead < (np.inf if spec.window is None else spec.window))
            exact = exact_attention(q[slots].astype(np.float64), k, v, visible, spec.soft_cap)
            expected.output[slots], expected.log_sum_exp[slots] = exact
        assert_close(found, expected, tolerance)


def assert_close(found: Exact, expected: Exact, tolerance: float) -> None:
    """Norm of each query's error over the norm of what is expected; the same of all finite logarithms at once."""
    flat = (len(found.output), -1)
    error = np.linalg.norm((found.output - expected.output).reshape(flat), axis=-1)
    allowed = tolerance * np.linalg.norm(expected.output.reshape(flat), axis=-1)
    assert (error <= allowed).all(), (error / allowed.clip(1e-300)).max() * tolerance
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, rtol=tolerance, atol=tolerance)
    finite = np.isfinite(expected.log_sum_exp)
    if finite.any():
        assert relative_error(found.log_sum_exp[finite], expected.log_sum_exp[finite]) < tolerance
