"""Loading a chunk of a segment's tokens: its words and scales, out of some pages, for one KV head; and unpacking them.

A chunk is `pages` pages by `tokens` tokens of each. Blocks have three axes, [pages, tokens, columns], of which scales
have 1 where they do not vary, so nothing is loaded twice. Triton wants powers of two and products over at least 16
columns: a packed lane's width is padded, and columns beyond it read as 0. So do tokens that do not count, whatever lies
there: no format may make anything but finite numbers of words that are all 0.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Granularity, KVFormat, PackedLanes, PageVectors
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
class PageReader:
    """Reads pages of one format."""

    kv_format: KVFormat
    geometry: PageGeometry

    @property
    def width(self) -> int:
        return self.kv_format.width(self.geometry)

    @property
    def columns(self) -> int:
        """The width as kernels see it."""
        return padded(self.width)

    def read(self, arena: Ref, chunk: Chunk, head: jax.Array) -> PageVectors:
        """What a chunk's words stand for: packed lanes that broadcast to f32[pages, tokens, columns]."""
        k, v = self._words(arena, chunk, head), self._words(arena, chunk, head + self.geometry.kv_heads)
        scales = self.kv_format.read_scales(self._scale_words(arena, chunk, head))
        return self.kv_format.unpack(k, v, scales)

    def flatten(self, chunk: Chunk, lanes: PackedLanes, dtype: jnp.dtype) -> PackedLanes:
        """Packed lanes as [pages x tokens, columns] of `dtype`."""
        shape = (*chunk.counts.shape[:2], self.columns)
        return tuple(jnp.broadcast_to(lane, shape).reshape(chunk.size, -1).astype(dtype) for lane in lanes)

    def _column(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (1, 1, self.columns), 2)

    def _words(self, arena: Ref, chunk: Chunk, block: jax.Array) -> PackedLanes:
        """The word parts, u16[pages, tokens, columns], of one of the page's blocks: K of all heads, then V of all."""
        column, vector = self._column(), self.kv_format.vector_words(self.geometry)
        first = block * self.kv_format.block_words(self.geometry) + chunk.token * vector
        inside = column < self.width
        return tuple(
            _load(arena, chunk.first_unit, first + (part * self.width + column), chunk.counts & inside)
            for part in range(self.kv_format.word_parts)
        )

    def _scale_words(self, arena: Ref, chunk: Chunk, head: jax.Array) -> PackedLanes:
        """The scale arrays, u16 of [pages, tokens, 1], [pages, 1, columns] or [pages, 1, 1]."""
        starts, sizes = self.kv_format.scale_starts(self.geometry), self.kv_format.scale_sizes(self.geometry)
        places: dict[Granularity, tuple[jax.Array | int, jax.Array]] = {
            Granularity.TOKEN: (chunk.token, chunk.counts),
            Granularity.CHANNEL: (self._column(), chunk.page_counts & (self._column() < self.width)),
            Granularity.PAGE: (0, chunk.page_counts),
        }
        arrays = []
        for granularity, start, size in zip(self.kv_format.scales, starts, sizes, strict=True):
            place, counts = places[granularity]
            arrays.append(_load(arena, chunk.first_unit, start + head * size + place, counts))
        return tuple(arrays)


def _load(arena: Ref, first_unit: jax.Array, words: jax.Array, mask: jax.Array) -> jax.Array:
    """The words `words`, counted from unit `first_unit`; 0 where the mask is not set."""
    return load(words_at(arena, first_unit, words), mask=mask, other=jnp.uint16(0))
