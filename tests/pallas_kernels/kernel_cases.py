"""What the kernel tests share: geometries, formats, the public functions jitted, arenas full of NaN, float64 oracles.

A change of a public signature needs an edit only here.
"""
# mypy: disable-error-code="call-arg"

import functools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_modules import example
from hypothesis import strategies as st

from fineserve_jax.pallas_kernels import operations
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.cpu import library
from fineserve_jax.pallas_kernels.formats import (
    FORMATS,
    NAMED_FORMATS,
    KVFormat,
    PageWords,
    UnpackedVectors,
    get_format,
)
from fineserve_jax.pallas_kernels.geometry import TPU_TILE, PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec, WriteSpec
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, Tiles
from fineserve_jax.pallas_kernels.xla.page_gather import gather_page_layers

NAN_WORD = 0xFFFF  # NaN as bf16 and as fp16; two of them are NaN as fp32; NaN as any scale or level
FAR_AWAY = 2**30  # a page far beyond every arena, as padding uses it
TOLERANCE = 1e-5  # of attention in float32 against float64: norm of the difference over norm


# -- geometries and formats --------------------------------------------------------------------------------


def make_geometry(
    kv_heads: int, head_dim: int, page_size: int = 16, num_layers: int = 2, *, tpu: bool = False
) -> PageGeometry:
    return PageGeometry(num_layers, kv_heads, head_dim, page_size, choose_unit_words(head_dim, page_size, tpu=tpu))


SMALL = make_geometry(kv_heads=2, head_dim=64)
SMALL_TPU = make_geometry(kv_heads=2, head_dim=64, tpu=True)
GEOMETRIES = (
    SMALL,
    make_geometry(kv_heads=3, head_dim=96, page_size=32),
    make_geometry(kv_heads=8, head_dim=128),
    make_geometry(kv_heads=1, head_dim=256, page_size=32),
    SMALL_TPU,
)
assert SMALL_TPU.unit_shape == TPU_TILE
PAGES = 8  # pages that tests encode at once: one number, so that they share compiled programs


@functools.cache
def example_int2() -> KVFormat:
    """The format that an example adds outside the package: 8 values a word, of which the kernels know nothing."""
    module = example("add_kv_format")
    return KVFormat(module.Keys(), module.Values())


PAIR = get_format("k8v4")  # of codecs that differ in all that a codec says of itself
ALL_FORMATS: dict[str, KVFormat] = FORMATS | NAMED_FORMATS | {"int2": example_int2(), PAIR.name: PAIR}
TOKEN_FORMATS = {name: f for name, f in ALL_FORMATS.items() if f.residual is None}
PAGE_FORMATS = {name: f for name, f in ALL_FORMATS.items() if f.residual is not None}


def geometry_id(geometry: PageGeometry) -> str:
    shape = f"{geometry.kv_heads}x{geometry.head_dim}x{geometry.page_size}"
    return shape if len(geometry.unit_shape) == 1 else f"{shape} tpu"


every_format = pytest.mark.parametrize("kv_format", ALL_FORMATS.values(), ids=ALL_FORMATS)
PACKAGED: dict[str, KVFormat] = FORMATS | NAMED_FORMATS
every_packaged_format = pytest.mark.parametrize("kv_format", PACKAGED.values(), ids=PACKAGED)
every_token_format = pytest.mark.parametrize("kv_format", TOKEN_FORMATS.values(), ids=TOKEN_FORMATS)
every_page_format = pytest.mark.parametrize("kv_format", PAGE_FORMATS.values(), ids=PAGE_FORMATS)
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES, ids=geometry_id)


def page_shape(geometry: PageGeometry) -> tuple[int, ...]:
    """Of the keys, and of the values, of `PAGES` pages with all their layers."""
    return (geometry.num_layers, geometry.kv_heads, PAGES, geometry.page_size, geometry.head_dim)


# -- the public functions, jitted --------------------------------------------------------------------------


class Stored(NamedTuple):
    """What became of keys and values: their words, and what these stand for."""

    words: PageWords
    k: np.ndarray  # as the model has them
    v: np.ndarray
    k_own: np.ndarray  # rotated as the format keeps them
    v_own: np.ndarray


def unpack(kv_format: KVFormat, words: PageWords) -> tuple[UnpackedVectors, UnpackedVectors]:
    """Keys and values as kernels see them."""
    of_keys, of_values = (codec.read_scales(side.scales) for codec, side in zip(kv_format.sides, words, strict=True))
    return kv_format.unpack(words, (of_keys, of_values))


@functools.partial(jax.jit, static_argnums=0)
def _encode(kv_format, k, v):
    return kv_format.encode_vectors(k, v)


@functools.partial(jax.jit, static_argnums=0)
def _decode(kv_format, words):
    return *kv_format.decode_vectors(words), *(side.join() for side in unpack(kv_format, words))


def store(kv_format: KVFormat, k: np.ndarray, v: np.ndarray) -> Stored:
    """Encodes f32[..., T, head_dim] and reads them back."""
    words = _encode(kv_format, k, v)
    return jax.tree.map(np.asarray, Stored(words, *_decode(kv_format, words)))


def _indices(*arrays) -> list[jax.Array]:
    return [jnp.asarray(array, jnp.int32) for array in arrays]


@functools.partial(jax.jit, static_argnames=("kv_format", "geometry", "implementation"))
def write_pages(arena, words, pages, kv_format, geometry, implementation="xla"):
    spec, format_ids = WriteSpec(geometry, (kv_format,), implementation), jnp.zeros(len(pages), jnp.int32)
    return operations.write_pages(spec, arena, {0: words}, *_indices(pages), format_ids)


@functools.partial(jax.jit, static_argnames=("kv_format", "geometry", "implementation"))
def write_tokens(arena, words, pages, offsets, kv_format, geometry, implementation="xla"):
    spec, format_ids = WriteSpec(geometry, (kv_format,), implementation), jnp.zeros(len(pages), jnp.int32)
    return operations.write_tokens(spec, arena, {0: words}, *_indices(pages, offsets), format_ids)


@functools.partial(jax.jit, static_argnames=("source", "target", "geometry", "implementation"))
def requantize(arena, sources, targets, count, source, target, geometry, implementation="xla"):
    spec = WriteSpec(geometry, (source, target), implementation)
    return operations.requantize(spec, source, target, arena, *_indices(sources, targets, count))


@functools.partial(jax.jit, static_argnames=("formats", "geometry", "implementation"))
def encode_and_write_tokens(arena, k, v, pages, offsets, format_ids, formats, geometry, implementation="xla"):
    spec = WriteSpec(geometry, formats, implementation)
    return operations.write_tokens(spec, arena, spec.encode_tokens(k, v), *_indices(pages, offsets, format_ids))


@functools.partial(jax.jit, static_argnames=("formats", "geometry", "implementation"))
def encode_and_write_pages(arena, k, v, pages, format_ids, formats, geometry, implementation="xla"):
    spec = WriteSpec(geometry, formats, implementation)
    return operations.write_pages(spec, arena, spec.encode_pages(k, v), *_indices(pages, format_ids))


@functools.partial(jax.jit, static_argnames=("kv_format", "geometry"))
def gather(arena, pages, kv_format, geometry) -> PageWords:
    """All layers of i32[pages]: the words as `encode` gave them, layers first."""
    layers = jnp.arange(geometry.num_layers, dtype=jnp.int32)[:, None]
    pages = jnp.broadcast_to(jnp.asarray(pages, jnp.int32), (geometry.num_layers, len(pages)))
    return gather_page_layers(arena, pages, layers, kv_format, geometry)


def paged_attention(spec, q, arena, tiles, layer, sinks=None) -> PartialAttention:
    return _paged_attention(spec, q, arena, tiles, layer, sinks)  # all of them by position: one program


_paged_attention = jax.jit(operations.paged_attention, static_argnums=0)
WITHIN = ("xla",) if library.why_unavailable() else ("xla", "cpu")
"""The implementations of `attend_within` there are here; those of the other backends are XLA's."""
attend_within = {
    name: jax.jit(get_backend(name).attend_within, static_argnames=("window", "soft_cap")) for name in WITHIN
}


# -- cached tokens -----------------------------------------------------------------------------------------


class Cached(NamedTuple):
    """A row's cached tokens in one layer: positions [tokens], float64 k and v of [kv_heads, tokens, D]."""

    positions: np.ndarray
    k: np.ndarray
    v: np.ndarray


class Cache:
    """An arena of NaN, into which cached tokens of many rows are written at random places.

    `kept[row]` lists what the row's cached tokens stand for, with all layers in front.
    """

    MAX_SEGMENTS = 24  # of `PAGES` pages each; a constant, since programs depend on the arena's size

    def __init__(
        self,
        geometry: PageGeometry,
        rng: np.random.Generator,
        formats: Iterable[KVFormat] = tuple(ALL_FORMATS.values()),
    ) -> None:
        self.geometry, self.rng, self.formats = geometry, rng, tuple(formats)
        self.segments: list[BatchSegment] = []
        self.kept: dict[int, list[Cached]] = {}
        longest = max(f.page_units(geometry) for f in self.formats)
        # Unit 0 begins the null page; every other place holds a page of any format.
        num_places = 1 + self.MAX_SEGMENTS * PAGES
        self.places = list(rng.permutation(np.arange(1, num_places)) * longest)
        self.arena = jnp.full((num_places * longest, *geometry.unit_shape), NAN_WORD, jnp.uint16)

    def add(self, row: int, format_name: str, num_tokens: int, first_position: int | None = None) -> None:
        """Caches random tokens of the row, behind those it has already unless said where.

        What its last page holds behind them is NaN where it can be.
        """
        geometry, size = self.geometry, self.geometry.page_size
        (format_id,) = (i for i, f in enumerate(self.formats) if f.name == format_name)
        kv_format, num_pages = self.formats[format_id], -(-num_tokens // size)
        k, v = (self.rng.standard_normal(page_shape(geometry), np.float32) for _ in "kv")
        if kv_format.residual is None:
            behind = np.arange(PAGES * size).reshape(-1, size, 1) >= num_tokens
            k, v = np.where(behind, np.float32(np.nan), k), np.where(behind, np.float32(np.nan), v)
        words, k, v, *_ = store(kv_format, k, v)
        pages = np.full(PAGES, FAR_AWAY, np.int32)
        pages[:num_pages] = [self.places.pop() for _ in range(num_pages)]
        self.arena = write_pages(self.arena, words, pages, kv_format, geometry)
        flat = (geometry.num_layers, geometry.kv_heads, -1, geometry.head_dim)
        k, v = (np.asarray(part, np.float64).reshape(flat)[:, :, :num_tokens] for part in (k, v))
        if first_position is None:
            first_position = self.next_position(row)
        self.kept.setdefault(row, []).append(Cached(first_position + np.arange(num_tokens), k, v))
        self.segments.append(BatchSegment(row, format_id, pages[:num_pages].tolist(), num_tokens, first_position))

    def next_position(self, row: int) -> int:
        """Behind all cached tokens of the row."""
        return max((int(part.positions[-1]) + 1 for part in self.kept.get(row, []) if len(part.positions)), default=0)

    def of(self, row: int, layer: int) -> Cached:
        """The row's cached tokens in a layer."""
        geometry = self.geometry
        nothing = np.zeros((geometry.num_layers, geometry.kv_heads, 0, geometry.head_dim))
        parts = [Cached(np.zeros(0, int), nothing, nothing), *self.kept.get(row, [])]
        k, v = (np.concatenate([part[i][layer] for part in parts], axis=1) for i in (1, 2))
        return Cached(np.concatenate([part.positions for part in parts]), k, v)

    def plan(self, spec: AttentionSpec, runs: Sequence[QueryRun]) -> Tiles:
        """Segments may be given in any order."""
        return operations.plan_attention(
            spec, [self.segments[i] for i in self.rng.permutation(len(self.segments))], runs
        )


def lengths(page_size: int) -> st.SearchStrategy[int]:
    """Numbers of cached tokens, those around page boundaries above all."""
    near = [0, 1, page_size - 1, page_size, page_size + 1, 2 * page_size, PAGES * page_size]
    return st.one_of(st.sampled_from(near), st.integers(0, PAGES * page_size))


class Row(NamedTuple):
    """A row of a batch.

    Attributes:
        segments: (format, cached tokens, gap in positions before them).
        position: of the row's first query; None: right behind its cached tokens.
    """

    segments: list[tuple[str, int, int]]
    position: int | None = None


def rows(spec: AttentionSpec) -> st.SearchStrategy[Row]:
    """Segments in any formats, a format twice too; queries behind the cached tokens, among them or before them."""
    names = st.sampled_from([kv_format.name for kv_format in spec.formats])
    segment = st.tuples(names, lengths(spec.geometry.page_size), st.sampled_from([0, 0, 1, 40]))
    return st.builds(Row, st.lists(segment, max_size=spec.segments_per_row), st.none() | st.integers(0, 300))


def make_cache(spec: AttentionSpec, rows: Sequence[Row], rng: np.random.Generator) -> tuple[Cache, list[int]]:
    """Caches the rows' tokens; also gives the positions of their first queries."""
    cache, positions = Cache(spec.geometry, rng, spec.formats), []
    for number, row in enumerate(rows):
        for name, num_tokens, gap in row.segments:
            cache.add(number, name, num_tokens, cache.next_position(number) + gap)
        positions.append(cache.next_position(number) if row.position is None else row.position)
    return cache, positions


# -- oracles -----------------------------------------------------------------------------------------------


class Exact(NamedTuple):
    """Attention in float64: output [queries, kv_heads, group, D], log_sum_exp [queries, kv_heads, group]."""

    output: np.ndarray
    log_sum_exp: np.ndarray


def exact_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    visible: np.ndarray | None = None,
    soft_cap: float | None = None,
    sinks: np.ndarray | None = None,
) -> Exact:
    """Textbook attention: q [queries, kv_heads, group, D] over k and v [kv_heads, tokens, D].

    Args:
        visible: bool[queries, tokens]; None: all.
        sinks: [kv_heads, group], logits without a value.
    """
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    logits = np.einsum("qhgd,htd->qhgt", q, k)
    if soft_cap is not None:
        logits = soft_cap * np.tanh(logits / soft_cap)
    if visible is not None:
        logits = np.where(visible[:, None, None], logits, -np.inf)
    if sinks is not None:
        sink = np.broadcast_to(np.asarray(sinks, np.float64)[..., None], (*q.shape[:3], 1))
        logits, v = np.concatenate([logits, sink], axis=-1), np.pad(v, [(0, 0), (0, 1), (0, 0)])
    m = np.maximum(logits.max(axis=-1, initial=-np.inf, keepdims=True), -1e300)
    weights = np.exp(logits - m)
    l = weights.sum(axis=-1, keepdims=True)
    output = np.einsum("qhgt,htd->qhgd", weights / np.where(l > 0, l, 1), v)
    with np.errstate(divide="ignore"):
        return Exact(output, (m + np.log(l))[..., 0])


def expected_attention(
    spec: AttentionSpec, cached: Cached, q: np.ndarray, first_position: int, sinks: np.ndarray | None = None
) -> Exact:
    """Of queries [queries, heads, D] at adjacent positions to a row's cached tokens."""
    _, heads, head_dim = q.shape
    grouped = q.reshape(-1, spec.geometry.kv_heads, heads // spec.geometry.kv_heads, head_dim)
    ahead = (first_position + np.arange(len(q)))[:, None] - cached.positions
    visible = (ahead >= 0) & (ahead < (np.inf if spec.window is None else spec.window))
    if sinks is not None:
        sinks = sinks.reshape(grouped.shape[1:3])
    return exact_attention(grouped, cached.k, cached.v, visible, spec.soft_cap, sinks)


def check_attention(
    spec: AttentionSpec,
    cache: Cache,
    q: np.ndarray,
    runs: Sequence[QueryRun],
    sinks: np.ndarray | None = None,
    tolerance: float = TOLERANCE,
    layers: Iterable[int] | None = None,
) -> None:
    """Attention of queries [num_queries, heads, D] to a cache, against the oracle, query by query.

    What slots without a query hold must not matter: it is NaN here.
    """
    used = np.zeros(len(q), bool)
    for run in runs:
        used[run.start : run.start + run.num_queries] = True
    padded = jnp.where(used[:, None, None], q, jnp.nan)
    tiles = cache.plan(spec, runs)
    for layer in range(spec.geometry.num_layers) if layers is None else layers:
        seen = paged_attention(spec, padded, cache.arena, tiles, layer, sinks)
        assert seen.l.shape == seen.m.shape == seen.acc.shape[:-1] == q.shape[:2]
        assert {part.dtype for part in seen} == {np.dtype(np.float32)}
        output, log_sum_exp = np.asarray(seen.output()), np.asarray(seen.log_sum_exp)
        if sinks is None:
            assert not np.asarray(seen.l)[~used].any()
            assert not np.asarray(seen.acc)[~used].any()
        for row, run in enumerate(runs):
            own = slice(run.start, run.start + run.num_queries)
            queries = np.asarray(q[own], np.float64)
            exact = expected_attention(spec, cache.of(row, layer), queries, run.first_position, sinks)
            _check_queries(output[own], log_sum_exp[own], exact, tolerance)


def _check_queries(output: np.ndarray, log_sum_exp: np.ndarray, exact: Exact, tolerance: float) -> None:
    expected = exact.output.reshape(output.shape)
    error = np.linalg.norm(output - expected, axis=(1, 2))
    allowed = tolerance * np.linalg.norm(expected, axis=(1, 2))
    assert (error <= allowed).all(), (error / allowed.clip(1e-300)).max() * tolerance  # both 0 where no key is seen
    np.testing.assert_allclose(
        log_sum_exp, exact.log_sum_exp.reshape(log_sum_exp.shape), rtol=tolerance, atol=tolerance
    )


def relative_error(result, expected: np.ndarray) -> float:
    result = np.asarray(result, np.float64)
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
