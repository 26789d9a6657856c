"""Loading and storing the keys, or the values, of some tokens of one head of a page, in Triton."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Granularity, KVFormat, PackedLanes
from fineserve_jax.pallas_kernels.formats.sides import sides_of_scales
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
    def width(self) -> int:
        return self.kv_format.width(self.geometry)

    def load(self, column: jax.Array) -> PackedLanes:
        """Packed lanes, f32[tokens, columns], of some columns, i32[1, columns]: rotated, finite beyond the width."""
        return self.unpack(self.load_words(column), column)

    def load_words(self, column: jax.Array) -> tuple[jax.Array, ...]:
        """The word parts, u16[tokens, columns], of some columns, i32[1, columns]; 0 beyond the width."""
        return tuple(self._load(places, column) for places in self._word_places(column))

    def unpack(self, words: tuple[jax.Array, ...], column: jax.Array) -> PackedLanes:
        """The packed lanes that words of some columns stand for."""
        none = jnp.zeros((1, 1), jnp.uint16)
        places_of_scales = self._scale_places(column)
        scales = tuple(none if places is None else self._load(places, column) for places in places_of_scales)
        # The other side's words are not looked at: what comes of them is dropped.
        vectors = self.kv_format.unpack(words, words, self.kv_format.read_scales(scales))
        return vectors.scaled_lanes()[self.side]

    def store(self, lanes: PackedLanes) -> None:
        """Encodes packed lanes, f32[tokens, columns], and stores them."""
        encoded = self.kv_format.encode(lanes, lanes)
        column = lax.broadcasted_iota(jnp.int32, (1, padded(self.width)), 1)
        words = (encoded.k, encoded.v)[self.side]
        for places, part in (
            *zip(self._word_places(column), words, strict=True),
            *zip(self._scale_places(column), encoded.scales, strict=True),
        ):
            if places is not None:
                store(words_at(self.arena, self.first_unit, places), part, mask=self._inside(places, column))

    def _word_places(self, column: jax.Array) -> tuple[jax.Array, ...]:
        """Where each part of the words of some columns, i32[1, columns], lies: i32[tokens, columns]."""
        geometry, kv_format = self.geometry, self.kv_format
        block = self.side * geometry.kv_heads + self.head
        first = block * kv_format.block_words(geometry) + self.token * kv_format.vector_words(geometry)
        return tuple(first + (part * self.width + column) for part in range(kv_format.word_parts))

    def _scale_places(self, column: jax.Array) -> list[jax.Array | None]:
        """Where the scales of the side lie; None for those of the other side."""
        geometry, kv_format = self.geometry, self.kv_format
        within = {
            Granularity.TOKEN: self.token,
            Granularity.CHANNEL: column,
            Granularity.PAGE: jnp.zeros((1, 1), jnp.int32),
        }
        arrays = zip(
            kv_format.scales,
            kv_format.scale_starts(geometry),
            kv_format.scale_sizes(geometry),
            sides_of_scales(kv_format),
            strict=True,
        )
        return [
            start + self.head * size + within[granularity] if side == self.side else None
            for granularity, start, size, side in arrays
        ]

    def _load(self, places: jax.Array, column: jax.Array) -> jax.Array:
        at_places = words_at(self.arena, self.first_unit, places)
        mask = self._inside(places, column)
        return load(at_places) if mask is None else load(at_places, mask=mask, other=jnp.uint16(0))

    def _inside(self, places: jax.Array, column: jax.Array) -> jax.Array | None:
        """Which places belong to columns that there are; None: all."""
        if self.width == padded(self.width) or places.shape[1] == 1:
            return None
        return jnp.broadcast_to(column < self.width, places.shape)
