"""Loading a chunk of a segment's tokens: its words and scales, out of some pages, for one KV head; and unpacking them.

A chunk is `pages` pages by `tokens` tokens of each. Blocks have three axes, [pages, tokens, columns], of which scales
have 1 where they do not vary, so nothing is loaded twice. Triton wants powers of two and products over at least 16
columns: a packed lane's width is padded, and columns beyond it read as 0. So do tokens that do not count, whatever lies
there: no format may make anything but finite numbers of words that are all 0.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import (
    KEYS,
    VALUES,
    Codec,
    EncodedVectors,
    Granularity,
    KVFormat,
    PackedLanes,
    PageVectors,
    PageWords,
)
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.triton.addressing import padded, words_at

Ref = Any


@dataclass(frozen=True)
class Chunk:
    """Some tokens of a segment.

    Attributes:
        first_unit: i32[pages, 1, 1], where each page's layer begins in the arena; 0 for pages that do not count.
        token: i32[1, tokens, 1], places in the page.
        counts: bool[pages, tokens, 1], which tokens count.
        page_counts: bool[pages, 1, 1], which pages hold any of them.
    """

    first_unit: jax.Array
    token: jax.Array
    counts: jax.Array
    page_counts: jax.Array

    @property
    def size(self) -> int:
        """Tokens of the chunk."""
        return math.prod(self.counts.shape)

    def by_token(self, scales: jax.Array) -> jax.Array:
        """One scale for each token, f32[1, pages x tokens], of scales that broadcast to [pages, tokens, 1]."""
        return jnp.broadcast_to(scales, self.counts.shape).reshape(1, self.size)


@dataclass(frozen=True)
class VectorReader:
    """Reads the keys of pages of one format, or their values.

    Attributes:
        start, scale_starts: where they begin in a page's layer, and each of their scale arrays, in words.
    """

    codec: Codec
    geometry: PageGeometry
    start: int
    scale_starts: tuple[int, ...]

    @property
    def width(self) -> int:
        return self.codec.width(self.geometry)

    @property
    def columns(self) -> int:
        """The width as kernels see it."""
        return padded(self.width)

    def flatten(self, chunk: Chunk, lanes: PackedLanes, dtype: jnp.dtype) -> PackedLanes:
        """Packed lanes as [pages x tokens, columns] of `dtype`."""
        shape = (*chunk.counts.shape[:2], self.columns)
        return tuple(jnp.broadcast_to(lane, shape).reshape(chunk.size, -1).astype(dtype) for lane in lanes)

    def load_words(self, arena: Ref, chunk: Chunk, head: jax.Array) -> PackedLanes:
        """The word parts, u16[pages, tokens, columns]."""
        column, vector = self._column(), self.codec.vector_words(self.geometry)
        first = self.start + head * self.codec.block_words(self.geometry) + chunk.token * vector
        inside = column < self.width
        return tuple(
            _load(arena, chunk.first_unit, first + (part * self.width + column), chunk.counts & inside)
            for part in range(self.codec.word_parts)
        )

    def read_scales(self, arena: Ref, chunk: Chunk, head: jax.Array) -> PackedLanes:
        """What the codec makes of the scale arrays: of [pages, tokens, 1], [pages, 1, columns] or [pages, 1, 1]."""
        places: dict[Granularity, tuple[jax.Array | int, jax.Array]] = {
            Granularity.TOKEN: (chunk.token, chunk.counts),
            Granularity.CHANNEL: (self._column(), chunk.page_counts & (self._column() < self.width)),
            Granularity.PAGE: (0, chunk.page_counts),
        }
        arrays = []
        sizes = self.codec.scale_sizes(self.geometry)
        for granularity, start, size in zip(self.codec.scales, self.scale_starts, sizes, strict=True):
            place, counts = places[granularity]
            arrays.append(_load(arena, chunk.first_unit, start + head * size + place, counts))
        return self.codec.read_scales(tuple(arrays))

    def _column(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (1, 1, self.columns), 2)


@dataclass(frozen=True)
class PageReader:
    """Reads pages of one format."""

    kv_format: KVFormat
    geometry: PageGeometry

    @cached_property
    def keys(self) -> VectorReader:
        return self._side(KEYS)

    @cached_property
    def values(self) -> VectorReader:
        return self._side(VALUES)

    def _side(self, side: int) -> VectorReader:
        start = self.kv_format.block_starts(self.geometry)[side]
        scale_starts = self.kv_format.scale_starts(self.geometry)[side]
        return VectorReader(self.kv_format.sides[side], self.geometry, start, scale_starts)

    def read(self, arena: Ref, chunk: Chunk, head: jax.Array) -> PageVectors:
        """What a chunk's words stand for: packed lanes that broadcast to f32[pages, tokens, columns]."""
        readers = self.keys, self.values
        words = PageWords(*(EncodedVectors(reader.load_words(arena, chunk, head)) for reader in readers))
        of_keys, of_values = (reader.read_scales(arena, chunk, head) for reader in readers)
        return self.kv_format.unpack(words, (of_keys, of_values))


def _load(arena: Ref, first_unit: jax.Array, words: jax.Array, mask: jax.Array) -> jax.Array:
    """The words `words`, counted from unit `first_unit`; 0 where the mask is not set."""
    return load(words_at(arena, first_unit, words), mask=mask, other=jnp.uint16(0))
