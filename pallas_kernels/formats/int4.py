"""int4: keys by channel, values by token in a rotated basis, all scales in 8 bits.

Keys have channels that stay far from zero over many tokens, so a range per channel over a page's tokens costs far less
than one per token (KIVI, arXiv 2402.02750); that needs the whole page, and the newest tokens stay in bf16 until then.
Values have no such channels; a Hadamard rotation spreads their outliers over the head (QuaRot, arXiv 2404.00456), then
a range per token does.

A range is two 8-bit numbers, `low` and `step`, relative to the largest of their kind in the page and head. A layer of a
page:

    | K, 4 bits | V, 4 bits | K ranges        | V ranges        | levels                         |
      see PageGeometry        kv_heads x D      kv_heads x T      4 x kv_heads bf16:
                              low << 8 | step   low << 8 | step   K low, K step, V low, V step
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.formats.base import KVFormat, PageWords
from fineserve_jax.pallas_kernels.formats.packing import (
    bf16_to_words,
    pack_planar,
    unpack_unsigned,
    words_to_f32,
)
from fineserve_jax.pallas_kernels.geometry import PageGeometry

CODES = 15
LOW_CODES, STEP_CODES = 127, 255
# Keep all-zero pages from dividing by zero; normal bf16 numbers.
SMALLEST_LEVEL = 2.0**-100
# A level rounds to bf16 by up to 2**-9 of itself; rounded from this much above, it still covers what it is to cover.
MARGIN = 1 + 2.0**-8


class Ranges(NamedTuple):
    """Ranges of one page-head's vectors: value ~ low + step * code.

    Attributes:
        words: u16[..., kv_heads, pages, n], low and step codes.
        low_level, step_level: u16[..., kv_heads, pages], bf16 bits.
    """

    words: jax.Array
    low_level: jax.Array
    step_level: jax.Array

    def read(self) -> tuple[jax.Array, jax.Array]:
        """low and step, f32[..., kv_heads, pages, n]."""
        low_code = lax.bitcast_convert_type(self.words, jnp.int16) >> 8
        low = low_code.astype(jnp.float32) * (words_to_f32(self.low_level) / LOW_CODES)[..., None]
        step_code = (self.words & 0xFF).astype(jnp.float32)
        return low, step_code * (words_to_f32(self.step_level) / STEP_CODES)[..., None]


class Int4(KVFormat):
    name = "int4"
    value_bits = 4
    tail = "bf16"

    def aux_words(self, geometry: PageGeometry) -> int:
        return geometry.kv_heads * (geometry.head_dim + geometry.page_size + 4)

    def encode(self, geometry: PageGeometry, k: jax.Array, v: jax.Array) -> PageWords:
        k_codes, k_ranges = _quantise(k, axis=-2)
        rotated = jnp.matmul(v, _rotation(geometry.head_dim), precision=lax.Precision.HIGHEST)
        v_codes, v_ranges = _quantise(rotated, axis=-1)
        return PageWords(pack_planar(k_codes, 4), pack_planar(v_codes, 4), _join(k_ranges, v_ranges))

    def decode(self, geometry: PageGeometry, words: PageWords) -> tuple[jax.Array, jax.Array]:
        k_ranges, v_ranges = _split(geometry, words.aux)
        k_low, k_step = k_ranges.read()
        v_low, v_step = v_ranges.read()
        k = unpack_unsigned(words.k, 4).astype(jnp.float32) * k_step[..., None, :] + k_low[..., None, :]
        v = unpack_unsigned(words.v, 4).astype(jnp.float32) * v_step[..., None] + v_low[..., None]
        return k, v

    def restore(self, output: jax.Array) -> jax.Array:
        return jnp.matmul(output, _rotation(output.shape[-1]).T, precision=lax.Precision.HIGHEST)


def _quantise(x: jax.Array, axis: int) -> tuple[jax.Array, Ranges]:
    """Codes i32 in [0, 15] of f32[..., kv_heads, pages, T, D], one range for all that lie along `axis` (-1 or -2)."""
    low, high = jnp.min(x, axis=axis), jnp.max(x, axis=axis)
    low_level = _level(jnp.max(jnp.abs(low), axis=-1))
    low_code = jnp.clip(jnp.floor(low / words_to_f32(low_level)[..., None] * LOW_CODES), -LOW_CODES - 1, LOW_CODES)
    covered_low = low_code * (words_to_f32(low_level) / LOW_CODES)[..., None]
    step = (high - covered_low) / CODES
    step_level = _level(jnp.max(step, axis=-1))
    step_code = jnp.clip(jnp.ceil(step / words_to_f32(step_level)[..., None] * STEP_CODES), 1, STEP_CODES)
    words = low_code.astype(jnp.int32) << 8 | step_code.astype(jnp.int32)
    ranges = Ranges(words.astype(jnp.uint16), low_level, step_level)
    low, step = (jnp.expand_dims(part, axis) for part in ranges.read())
    return jnp.clip(jnp.round((x - low) / step), 0, CODES).astype(jnp.int32), ranges


def _level(largest: jax.Array) -> jax.Array:
    return bf16_to_words(jnp.maximum(largest * MARGIN, SMALLEST_LEVEL))


def _join(k: Ranges, v: Ranges) -> jax.Array:
    """u16[..., pages, aux_words]."""
    levels = jnp.stack([k.low_level, k.step_level, v.low_level, v.step_level])
    levels = jnp.moveaxis(levels, (0, -1), (-2, -3))
    parts = [jnp.moveaxis(k.words, -2, -3), jnp.moveaxis(v.words, -2, -3), levels]
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)


def _split(geometry: PageGeometry, aux: jax.Array) -> tuple[Ranges, Ranges]:
    """The inverse of `_join`."""
    heads = geometry.kv_heads
    sizes = (heads * geometry.head_dim, heads * geometry.page_size, 4 * heads)
    k, v, levels = jnp.split(aux, np.cumsum(sizes)[:-1], axis=-1)
    levels = jnp.moveaxis(levels.reshape(*levels.shape[:-1], 4, heads), (-2, -3), (0, -1))
    k, v = (jnp.moveaxis(part.reshape(*part.shape[:-1], heads, -1), -3, -2) for part in (k, v))
    return Ranges(k, levels[0], levels[1]), Ranges(v, levels[2], levels[3])


@functools.cache
def _rotation(head_dim: int) -> np.ndarray:
    """f32[head_dim, head_dim], orthogonal: Hadamard blocks as long as the largest power of two in `head_dim`."""
    block = math.gcd(head_dim, 1 << 30)
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.kron(np.eye(head_dim // block, dtype=np.float32), hadamard / np.float32(math.sqrt(block)))
