"""Loading and storing the keys, or the values, of some tokens of one head of a page, in Triton."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Codec, Granularity, KVFormat, PackedLanes
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store
from fineserve_jax.pallas_kernels.triton.addressing import padded, words_at

Ref = Any


@dataclass(frozen=True)
class VectorBlock:
    """The keys or the values of some tokens, i32[tokens, 1], of one head of one layer of a page in the arena.

    Arrays are [tokens, columns], columns being words of a vector.
    """

    kv_format: KVFormat
    geometry: PageGeometry
    arena: Ref
    first_unit: jax.Array
    side: int
    head: jax.Array
    token: jax.Array

    @property
    def codec(self) -> Codec:
        return self.kv_format.sides[self.side]

    @property
    def width(self) -> int:
        return self.codec.width(self.geometry)

    def load(self, column: jax.Array) -> PackedLanes:
        """Packed lanes, f32[tokens, columns], of some columns, i32[1, columns]: rotated, finite beyond the width."""
        return self.unpack(self.load_words(column), column)

    def load_words(self, column: jax.Array) -> tuple[jax.Array, ...]:
        """The word parts, u16[tokens, columns], of some columns, i32[1, columns]; 0 beyond the width."""
        return tuple(self._load(places, column) for places in self._word_places(column))

    def unpack(self, words: tuple[jax.Array, ...], column: jax.Array) -> PackedLanes:
        """The packed lanes that words of some columns stand for."""
        scales = tuple(self._load(places, column) for places in self._scale_places(column))
        return self.codec.unpack(words, self.codec.read_scales(scales)).scaled_lanes()

    def store(self, lanes: PackedLanes) -> None:
        """Encodes packed lanes, f32[tokens, columns], and stores them."""
        words, scales = self.codec.encode(lanes)
        column = lax.broadcasted_iota(jnp.int32, (1, padded(self.width)), 1)
        all_places = (*self._word_places(column), *self._scale_places(column))
        for places, part in zip(all_places, (*words, *scales), strict=True):
            store(words_at(self.arena, self.first_unit, places), part, mask=self._inside(places, column))

    def _word_places(self, column: jax.Array) -> tuple[jax.Array, ...]:
        """Where each part of the words of some columns, i32[1, columns], lies: i32[tokens, columns]."""
        geometry, codec = self.geometry, self.codec
        start = self.kv_format.block_starts(geometry)[self.side]
        first = start + self.head * codec.block_words(geometry) + self.token * codec.vector_words(geometry)
        return tuple(first + (part * self.width + column) for part in range(codec.word_parts))

    def _scale_places(self, column: jax.Array) -> tuple[jax.Array, ...]:
        """Where the scales lie that cover the tokens and columns."""
        within = {
            Granularity.TOKEN: self.token,
            Granularity.CHANNEL: column,
            Granularity.PAGE: jnp.zeros((1, 1), jnp.int32),
        }
        starts = self.kv_format.scale_starts(self.geometry)[self.side]
        arrays = zip(self.codec.scales, starts, self.codec.scale_sizes(self.geometry), strict=True)
        return tuple(start + self.head * size + within[granularity] for granularity, start, size in arrays)

    def _load(self, places: jax.Array, column: jax.Array) -> jax.Array:
        at_places = words_at(self.arena, self.first_unit, places)
        mask = self._inside(places, column)
        return load(at_places) if mask is None else load(at_places, mask=mask, other=jnp.uint16(0))

    def _inside(self, places: jax.Array, column: jax.Array) -> jax.Array | None:
        """Which places belong to columns that there are; None: all."""
        if self.width == padded(self.width) or places.shape[1] == 1:
            return None
        return jnp.broadcast_to(column < self.width, places.shape)
