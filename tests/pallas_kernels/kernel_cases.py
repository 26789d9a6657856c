"""What the kernel tests share: geometries, the public functions jitted, arenas full of NaN, and oracles in float64.

A change of a public signature needs an edit only here.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fineserve_jax.pallas_kernels.formats import FORMATS, PageWords, TokenFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.xla import chunk as chunk_kernel
from fineserve_jax.pallas_kernels.xla import decode as decode_kernel
from fineserve_jax.pallas_kernels.xla import write as write_kernels
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers
from fineserve_jax.pallas_kernels.xla.tiles import BatchSegment, plan_tiles

NAN_WORD = 0xFFFF  # NaN as bf16 and as fp16; two of them are NaN as fp32; NaN as any scale or level
FAR_AWAY = 2**30  # a page far beyond every arena, as padding uses it
TOLERANCE = 1e-5  # of attention in float32 against float64: norm of the difference over norm


def make_geometry(kv_heads: int, head_dim: int, page_size: int = 16, num_layers: int = 2) -> PageGeometry:
    return PageGeometry(num_layers, kv_heads, head_dim, page_size, choose_unit_words(head_dim, page_size))


SMALL = make_geometry(kv_heads=2, head_dim=64)
GEOMETRIES = (
    SMALL,
    make_geometry(kv_heads=3, head_dim=96, page_size=32),
    make_geometry(kv_heads=8, head_dim=128),
    make_geometry(kv_heads=1, head_dim=256, page_size=32),
)
PAGES = 8  # pages that tests encode at once: one number, so that they share compiled programs
TOKEN_FORMATS = {name: f for name, f in FORMATS.items() if isinstance(f, TokenFormat)}

every_format = pytest.mark.parametrize("kv_format", FORMATS.values(), ids=FORMATS)
every_token_format = pytest.mark.parametrize("kv_format", TOKEN_FORMATS.values(), ids=TOKEN_FORMATS)
every_geometry = pytest.mark.parametrize(
    "geometry", GEOMETRIES, ids=lambda g: f"{g.kv_heads}x{g.head_dim}x{g.page_size}"
)


def page_shape(geometry: PageGeometry) -> tuple[int, ...]:
    """Of the keys, and of the values, of `PAGES` pages with all their layers."""
    return (geometry.num_layers, geometry.kv_heads, PAGES, geometry.page_size, geometry.head_dim)


# -- the public functions, jitted --------------------------------------------------------------------------


class Stored(NamedTuple):
    """What became of keys and values: their words, and what these stand for."""

    words: PageWords
    k: np.ndarray  # in the model's basis
    v: np.ndarray
    k_own: np.ndarray  # in the format's own
    v_own: np.ndarray


@functools.partial(jax.jit, static_argnums=(0, 1))
def _store(kv_format, geometry, k, v):
    words = kv_format.encode(geometry, k, v)
    k, v = kv_format.decode(geometry, words)
    return Stored(words, kv_format.from_basis(k), kv_format.from_basis(v), k, v)


def store(kv_format, geometry, k, v) -> Stored:
    """Encodes pages and reads them back."""
    return jax.tree.map(np.asarray, _store(kv_format, geometry, k, v))


@functools.partial(jax.jit, static_argnames=("kv_format", "geometry"))
def write_pages(arena, words, pages, kv_format, geometry):
    return write_kernels.write_pages(arena, words, jnp.asarray(pages, jnp.int32), kv_format, geometry)


@functools.partial(jax.jit, static_argnames=("kv_format", "geometry"))
def write_tokens(arena, words, pages, offsets, kv_format, geometry):
    pages, offsets = jnp.asarray(pages, jnp.int32), jnp.asarray(offsets, jnp.int32)
    return write_kernels.write_tokens(arena, words, pages, offsets, kv_format, geometry)


@functools.partial(jax.jit, static_argnames=("source", "target", "geometry"))
def requantise(arena, sources, targets, count, source, target, geometry):
    pages = (jnp.asarray(sources, jnp.int32), jnp.asarray(targets, jnp.int32))
    return write_kernels.requantise(arena, *pages, count, source, target, geometry)


@functools.partial(jax.jit, static_argnames=("kv_format", "geometry"))
def gather(arena, pages, kv_format, geometry) -> PageWords:
    """All layers of i32[pages]: the words as `encode` gave them, layers first."""
    layers = jnp.arange(geometry.num_layers, dtype=jnp.int32)[:, None]
    pages = jnp.broadcast_to(jnp.asarray(pages, jnp.int32), (geometry.num_layers, len(pages)))
    return gather_page_layers(arena, pages, layers, kv_format, geometry)


@functools.partial(jax.jit, static_argnames=("formats", "geometry"))
def decode_attention(q, own_k, own_v, arena, tiles, layer, formats, geometry):
    """q f32[rows, kv_heads, group, D] over each row's pages and its own token's k, v f32[rows, kv_heads, D]."""
    logit = jnp.sum(q * own_k[:, :, None], axis=-1)
    own = PartialAttention(logit, jnp.ones_like(logit), jnp.broadcast_to(own_v[:, :, None], q.shape))
    return decode_kernel.extend_over_pages(own, q, arena, tiles, layer, formats, geometry).output()


@functools.partial(jax.jit, static_argnames=("formats", "geometry"))
def chunk_attention(q, own_page, earlier_pages, chunk_of_page, arena, tiles, layer, formats, geometry):
    """q f32[kv_heads, C, group, D] over each chunk's own and cached tokens."""
    seen = chunk_kernel.attend_within(q, own_page, earlier_pages, chunk_of_page)
    slots = jnp.repeat(chunk_of_page, geometry.page_size)
    return chunk_kernel.extend_over_pages(seen, q, slots, arena, tiles, layer, formats, geometry).output()


# -- cached tokens -----------------------------------------------------------------------------------------


class Cache:
    """An arena of NaN, into which cached tokens of many rows are written at random places.

    `kept[row]` lists what the row's cached tokens stand for: float64 k and v of [layers, kv_heads, tokens, D].
    """

    MAX_SEGMENTS = 16  # of `PAGES` pages each

    def __init__(self, geometry: PageGeometry, rng: np.random.Generator) -> None:
        self.geometry, self.rng = geometry, rng
        self.formats = tuple(FORMATS.values())
        self.segments: list[BatchSegment] = []
        self.kept: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        longest = max(f.page_units(geometry) for f in self.formats)
        # Unit 0 begins the null page; every other place holds a page of any format.
        num_places = 1 + self.MAX_SEGMENTS * PAGES
        self.places = list(rng.permutation(np.arange(1, num_places)) * longest)
        self.arena = jnp.full((num_places * longest, geometry.unit_words), NAN_WORD, jnp.uint16)

    def add(self, row: int, format_name: str, num_tokens: int) -> None:
        """Caches further random tokens of the row; what its last page holds behind them is NaN where it can be."""
        geometry, kv_format = self.geometry, FORMATS[format_name]
        size = geometry.page_size
        num_pages = -(-num_tokens // size)
        k, v = (self.rng.standard_normal(page_shape(geometry), np.float32) for _ in "kv")
        if kv_format.tail is None:
            behind = np.arange(PAGES * size).reshape(-1, size, 1) >= num_tokens
            k, v = np.where(behind, np.float32(np.nan), k), np.where(behind, np.float32(np.nan), v)
        words, k, v, *_ = store(kv_format, geometry, k, v)
        pages = np.full(PAGES, FAR_AWAY, np.int32)
        pages[:num_pages] = [self.places.pop() for _ in range(num_pages)]
        self.arena = write_pages(self.arena, words, pages, kv_format, geometry)
        flat = (geometry.num_layers, geometry.kv_heads, -1, geometry.head_dim)
        kept = tuple(np.asarray(part, np.float64).reshape(flat)[:, :, :num_tokens] for part in (k, v))
        self.kept.setdefault(row, []).append(kept)
        format_id = self.formats.index(kv_format)
        self.segments.append(BatchSegment(row, format_id, pages[:num_pages].tolist(), num_tokens))

    def of(self, row: int, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """The row's cached k and v in a layer, float64[kv_heads, tokens, D]."""
        none = np.zeros((self.geometry.kv_heads, 0, self.geometry.head_dim))
        parts = self.kept.get(row, [])
        return tuple(np.concatenate([none, *(part[i][layer] for part in parts)], axis=1) for i in (0, 1))

    def tiles(self, shape):
        self.rng.shuffle(self.segments)
        return plan_tiles(self.segments, shape, self.geometry.page_size)


def exact_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Textbook attention in float64: q [kv_heads, group, D] over k and v [kv_heads, tokens, D]."""
    q, k, v = (np.asarray(part, np.float64) for part in (q, k, v))
    logits = np.einsum("hgd,htd->hgt", q, k)
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("hgt,htd->hgd", weights / weights.sum(-1, keepdims=True), v)


def relative_error(result, expected: np.ndarray) -> float:
    result = np.asarray(result, np.float64)
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))
