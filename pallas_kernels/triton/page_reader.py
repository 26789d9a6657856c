"""Loading a chunk of a segment's tokens: its words and auxiliary parts, out of some pages, for one KV head.

A chunk is `pages` pages by `tokens` tokens of each. Blocks have three axes, [pages, tokens, lanes], of which auxiliary
parts have 1 where they do not vary, so nothing is loaded twice. Triton wants powers of two and products over at least
16 lanes: a plane's width is padded, and lanes beyond it read as 0. So do tokens that do not count, whatever lies there:
no format may make anything but finite numbers of words that are all 0.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Aux, KVFormat, Planes
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


@dataclass(frozen=True)
class PageReader:
    """Reads pages of one format."""

    kv_format: KVFormat
    geometry: PageGeometry

    @property
    def width(self) -> int:
        return self.kv_format.width(self.geometry)

    @property
    def lanes(self) -> int:
        """The width as kernels see it."""
        return padded(self.width)

    def lane(self) -> jax.Array:
        return lax.broadcasted_iota(jnp.int32, (1, 1, self.lanes), 2)

    def k_words(self, arena: Ref, chunk: Chunk, head: jax.Array) -> Planes:
        return self._words(arena, chunk, head)

    def v_words(self, arena: Ref, chunk: Chunk, head: jax.Array) -> Planes:
        return self._words(arena, chunk, head + self.geometry.kv_heads)

    def _words(self, arena: Ref, chunk: Chunk, block: jax.Array) -> Planes:
        """The word parts, u16[pages, tokens, lanes], of one of the page's blocks: K of all heads, then V of all."""
        lane, vector = self.lane(), self.kv_format.vector_words(self.geometry)
        first = block * self.kv_format.block_words(self.geometry) + chunk.token * vector
        inside = lane < self.width
        return tuple(
            _load(arena, chunk.first_unit, first + (part * self.width + lane), chunk.counts & inside)
            for part in range(self.kv_format.word_parts)
        )

    def aux(self, arena: Ref, chunk: Chunk, head: jax.Array) -> Planes:
        """The auxiliary parts, u16 of [pages, tokens, 1], [pages, 1, lanes] or [pages, 1, 1]."""
        starts, sizes = (f(self.geometry) for f in (self.kv_format.aux_starts, self.kv_format.aux_sizes))
        places: dict[Aux, tuple[jax.Array | int, jax.Array]] = {
            Aux.TOKEN: (chunk.token, chunk.counts),
            Aux.CHANNEL: (self.lane(), chunk.page_counts & (self.lane() < self.width)),
            Aux.PAGE: (0, chunk.page_counts),
        }
        parts = []
        for kind, start, size in zip(self.kv_format.aux, starts, sizes, strict=True):
            place, counts = places[kind]
            parts.append(_load(arena, chunk.first_unit, start + head * size + place, counts))
        return tuple(parts)


def _load(arena: Ref, first_unit: jax.Array, words: jax.Array, mask: jax.Array) -> jax.Array:
    """The words `words`, counted from unit `first_unit`; 0 where the mask is not set."""
    return load(words_at(arena, first_unit, words), mask=mask, other=jnp.uint16(0))
