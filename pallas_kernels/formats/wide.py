"""Codecs that quantise nothing beyond floating-point rounding: bf16, fp16, and fp32 for tests of exactness."""

from abc import abstractmethod

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import BFloat16Sizes, Float16Sizes, Float32Sizes
from fineserve_jax.pallas_kernels.formats.base import Codec, EncodedVectors, PackedLanes, UnpackedVectors
from fineserve_jax.pallas_kernels.formats.bit_packing import bf16_to_words, words_to_f32

FP16_MAX = 65504.0
FP16_STEP = 2.0**-24  # of its subnormal numbers
FP16_BIAS = 127 - 15  # of f32's exponent over fp16's


class WideCodec(Codec):
    """Words are the numbers' own bits; nothing besides."""

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        return EncodedVectors(self.to_words(*lanes))

    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        return UnpackedVectors((self.to_f32(*words),))

    @abstractmethod
    def to_words(self, values: jax.Array) -> PackedLanes:
        """f32 -> the word parts, u16 of the same shape each."""

    @abstractmethod
    def to_f32(self, *parts: jax.Array) -> jax.Array:
        """The inverse of `to_words`."""


class BFloat16Codec(BFloat16Sizes, WideCodec):
    def to_words(self, values: jax.Array) -> PackedLanes:
        return (bf16_to_words(values),)

    def to_f32(self, *parts: jax.Array) -> jax.Array:
        return words_to_f32(*parts)


class Float16Codec(Float16Sizes, WideCodec):
    """Values beyond the range of fp16 saturate: an infinity would spread to every later token."""

    def to_words(self, values: jax.Array) -> PackedLanes:
        clipped = jnp.clip(values, -FP16_MAX, FP16_MAX)
        return (lax.bitcast_convert_type(clipped.astype(jnp.float16), jnp.uint16),)

    def to_f32(self, *parts: jax.Array) -> jax.Array:
        return fp16_words_to_f32(*parts)


class Float32Codec(Float32Sizes, WideCodec):
    """Two words a value: the upper halves of a vector's values, then the lower halves."""

    def to_words(self, values: jax.Array) -> PackedLanes:
        bits = lax.bitcast_convert_type(values, jnp.uint32)
        return (bits >> 16).astype(jnp.uint16), (bits & 0xFFFF).astype(jnp.uint16)

    def to_f32(self, *parts: jax.Array) -> jax.Array:
        upper, lower = (part.astype(jnp.uint32) for part in parts)
        return lax.bitcast_convert_type(upper << 16 | lower, jnp.float32)


def fp16_words_to_f32(words: jax.Array) -> jax.Array:
    """fp16 bits, u16 -> the number, f32: bit by bit, because not every chip that runs the kernels knows fp16."""
    bits = words.astype(jnp.int32)
    magnitude = bits & 0x7FFF
    subnormal = lax.bitcast_convert_type(magnitude.astype(jnp.float32) * FP16_STEP, jnp.int32)
    normal = (magnitude << 13) + (FP16_BIAS << 23)
    infinite = magnitude << 13 | 0xFF << 23  # or NaN
    magnitude = jnp.where(magnitude < 1 << 10, subnormal, jnp.where(magnitude < 31 << 10, normal, infinite))
    return lax.bitcast_convert_type(magnitude | (bits & 0x8000) << 16, jnp.float32)
