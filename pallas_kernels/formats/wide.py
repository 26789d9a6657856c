"""Formats that quantise nothing beyond floating-point rounding: bf16, fp16, and fp32 for tests of exactness."""

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats.base import PageVectors, PageWords, TokenFormat
from fineserve_jax.pallas_kernels.formats.packing import bf16_to_words, words_to_f32
from fineserve_jax.pallas_kernels.geometry import PageGeometry

FP16_MAX = 65504.0


class WideFormat(TokenFormat):
    """Words are the numbers' own bits; nothing besides."""

    def encode(self, geometry: PageGeometry, k: jax.Array, v: jax.Array) -> PageWords:
        return PageWords(self.to_words(k), self.to_words(v), self.join_aux([], k))

    def unpack(self, geometry: PageGeometry, words: PageWords) -> PageVectors:
        return PageVectors((self.to_f32(words.k),), (self.to_f32(words.v),))

    def to_words(self, values: jax.Array) -> jax.Array:
        raise NotImplementedError

    def to_f32(self, words: jax.Array) -> jax.Array:
        raise NotImplementedError


class BFloat16(WideFormat):
    name = "bf16"
    value_bits = 16

    def to_words(self, values: jax.Array) -> jax.Array:
        return bf16_to_words(values)

    def to_f32(self, words: jax.Array) -> jax.Array:
        return words_to_f32(words)


class Float16(WideFormat):
    """Values beyond the range of fp16 saturate: an infinity would spread to every later token."""

    name = "fp16"
    value_bits = 16

    def to_words(self, values: jax.Array) -> jax.Array:
        clipped = jnp.clip(values, -FP16_MAX, FP16_MAX)
        return lax.bitcast_convert_type(clipped.astype(jnp.float16), jnp.uint16)

    def to_f32(self, words: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(words, jnp.float16).astype(jnp.float32)


class Float32(WideFormat):
    """Two words a value: the upper halves of a vector's values, then the lower halves."""

    name = "fp32"
    value_bits = 32

    def to_words(self, values: jax.Array) -> jax.Array:
        bits = lax.bitcast_convert_type(values, jnp.uint32)
        return jnp.concatenate([bits >> 16, bits & 0xFFFF], axis=-1).astype(jnp.uint16)

    def to_f32(self, words: jax.Array) -> jax.Array:
        upper, lower = jnp.split(words.astype(jnp.uint32), 2, axis=-1)
        return lax.bitcast_convert_type(upper << 16 | lower, jnp.float32)
