"""Token-wise formats whose codes stand under one bf16 scale per token and head."""

from abc import abstractmethod

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats.base import KVFormat, PageVectors, PageWords, Planes
from fineserve_jax.pallas_kernels.formats.bit_packing import bf16_to_words, largest, pack_planar, words_to_f32

# Keeps an all-zero vector from dividing by zero, and is a normal bf16.
SMALLEST_SCALE = 2.0**-100


class ScaledFormat(KVFormat):
    """x ~ scale * code, scale = max|x| / largest_code rounded to bf16; the code is chosen for the rounded scale.

    Attributes:
        largest_code: the largest number that a code stands for.
    """

    largest_code: float

    @abstractmethod
    def to_codes(self, values: jax.Array) -> jax.Array:
        """The codes, i32 of which the lowest `value_bits` count, of f32 in about +-largest_code."""

    @abstractmethod
    def from_words(self, words: jax.Array) -> Planes:
        """The numbers, f32, that the codes in each plane of the words stand for: finite, whatever the words."""

    def encode(self, k: Planes, v: Planes) -> PageWords:
        k_words, k_scale = self._quantise(k)
        v_words, v_scale = self._quantise(v)
        return PageWords((k_words,), (v_words,), (k_scale, v_scale))

    def read_aux(self, aux: Planes) -> Planes:
        return tuple(words_to_f32(scale) for scale in aux)

    def unpack(self, k: Planes, v: Planes, numbers: Planes) -> PageVectors:
        return PageVectors(self.from_words(*k), self.from_words(*v), *numbers)

    def _quantise(self, planes: Planes) -> tuple[jax.Array, jax.Array]:
        """The words of f32[..., T, width] planes, and the bits of their scales, u16[..., T, 1]."""
        peak = largest(tuple(jnp.abs(plane) for plane in planes))
        scale_words = bf16_to_words(jnp.maximum(peak / self.largest_code, SMALLEST_SCALE))
        scale = words_to_f32(scale_words)
        return pack_planar(tuple(self.to_codes(plane / scale) for plane in planes), self.value_bits), scale_words
