"""int8: symmetric, one bf16 scale per token and head."""

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats.base import Aux, KVFormat, PageVectors, PageWords, Planes
from fineserve_jax.pallas_kernels.formats.packing import (
    bf16_to_words,
    largest,
    nearest_codes,
    pack_planar,
    unpack_signed,
    words_to_f32,
)

LARGEST = 127
# The smallest scale: keeps an all-zero vector from dividing by zero, and is a normal bf16.
SMALLEST_SCALE = 2.0**-100


class Int8(KVFormat):
    """x ~ scale * q, q in [-127, 127], scale = max|x| / 127 rounded to bf16; q is chosen for the rounded scale."""

    name = "int8"
    value_bits = 8
    aux = (Aux.TOKEN, Aux.TOKEN)  # the scales of K, then of V

    def encode(self, k: Planes, v: Planes) -> PageWords:
        k_words, k_scale = _quantise(k)
        v_words, v_scale = _quantise(v)
        return PageWords((k_words,), (v_words,), (k_scale, v_scale))

    def read_aux(self, aux: Planes) -> Planes:
        return tuple(words_to_f32(scale) for scale in aux)

    def unpack(self, k: Planes, v: Planes, numbers: Planes) -> PageVectors:
        k_scale, v_scale = numbers
        return PageVectors(unpack_signed(k[0], 8), unpack_signed(v[0], 8), k_scale, v_scale)


def _quantise(planes: Planes) -> tuple[jax.Array, jax.Array]:
    """The words of f32[..., T, width] planes, and the bits of their scales, u16[..., T, 1]."""
    scale = jnp.maximum(largest(tuple(jnp.abs(plane) for plane in planes)) / LARGEST, SMALLEST_SCALE)
    scale_words = bf16_to_words(scale)
    scale = words_to_f32(scale_words)
    codes = tuple(nearest_codes(plane / scale, -LARGEST, LARGEST) for plane in planes)
    return pack_planar(codes, 8), scale_words
