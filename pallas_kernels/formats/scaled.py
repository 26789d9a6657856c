"""Token-wise codecs whose codes stand under one bf16 scale per token and head."""

from abc import abstractmethod

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats.base import Codec, EncodedVectors, PackedLanes, UnpackedVectors
from fineserve_jax.pallas_kernels.formats.bit_packing import bf16_to_words, largest, pack_lanes, words_to_f32

# Keeps an all-zero vector from dividing by zero, and is a normal bf16.
SMALLEST_SCALE = 2.0**-100


class ScaledCodec(Codec):
    """x ~ scale * code, scale = max|x| / largest_code rounded to bf16; the code is chosen for the rounded scale.

    Attributes:
        largest_code: the largest number that a code stands for.
    """

    largest_code: float

    @abstractmethod
    def to_codes(self, values: jax.Array) -> jax.Array:
        """The codes, i32 of which the lowest `value_bits` count, of f32 in about +-largest_code."""

    @abstractmethod
    def from_words(self, words: jax.Array) -> PackedLanes:
        """The numbers, f32, that the codes in each lane of the words stand for: finite, whatever the words."""

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        magnitude = largest(tuple(jnp.abs(lane) for lane in lanes))
        scale_words = bf16_to_words(jnp.maximum(magnitude / self.largest_code, SMALLEST_SCALE))
        scale = words_to_f32(scale_words)
        words = pack_lanes(tuple(self.to_codes(lane / scale) for lane in lanes), self.value_bits)
        return EncodedVectors((words,), (scale_words,))

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        return (words_to_f32(*scales),)

    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        return UnpackedVectors(self.from_words(*words), *scales)
