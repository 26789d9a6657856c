"""int8: symmetric, one bf16 scale per token and head."""

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats.base import PageVectors, PageWords, TokenFormat
from fineserve_jax.pallas_kernels.formats.packing import (
    bf16_to_words,
    pack_planar,
    settled,
    unpack_signed,
    words_to_f32,
)
from fineserve_jax.pallas_kernels.geometry import PageGeometry

LARGEST = 127
# The smallest scale: keeps an all-zero vector from dividing by zero, and is a normal bf16.
SMALLEST_SCALE = 2.0**-100


class Int8(TokenFormat):
    """x ~ scale * q, q in [-127, 127], scale = max|x| / 127 rounded to bf16; q is chosen for the rounded scale."""

    name = "int8"
    value_bits = 8
    aux_planes = 2  # the scales of K, then of V

    def encode(self, geometry: PageGeometry, k: jax.Array, v: jax.Array) -> PageWords:
        k_words, k_scale = self._quantise(k)
        v_words, v_scale = self._quantise(v)
        return PageWords(k_words, v_words, self.join_aux([k_scale, v_scale], k))

    def unpack(self, geometry: PageGeometry, words: PageWords) -> PageVectors:
        k_scale, v_scale = settled(*(words_to_f32(scale) for scale in self.split_aux(geometry, words.aux)))
        return PageVectors(unpack_signed(words.k, 8), unpack_signed(words.v, 8), k_scale, v_scale)

    def _quantise(self, values: jax.Array) -> tuple[jax.Array, jax.Array]:
        scale = jnp.maximum(jnp.max(jnp.abs(values), axis=-1) / LARGEST, SMALLEST_SCALE)
        scale_words = bf16_to_words(scale)
        quantised = jnp.round(values / words_to_f32(scale_words)[..., None])
        return pack_planar(jnp.clip(quantised, -LARGEST, LARGEST).astype(jnp.int32), 8), scale_words
