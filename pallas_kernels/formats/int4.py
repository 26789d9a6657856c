"""int4: keys by channel, values by token, both in a rotated basis, all scales in 8 bits.

Keys have channels that stay far from zero over many tokens, so a range per channel over a page's tokens costs far less
than one per token (KIVI, arXiv 2402.02750); that needs the whole page, and the newest tokens stay in bf16 until then.
Values have no such channels: a range per token serves them. A Hadamard rotation of the head's channels (QuaRot, arXiv
2404.00456) spreads outliers, of keys too, whose channels then need ranges of about the same size.

A range is two 8-bit numbers, `low` and `step`, in units that the page and head share. A layer of a page:

    | K, 4 bits | V, 4 bits | K ranges        | V ranges        | units                          |
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

from fineserve_jax.pallas_kernels.formats.base import KVFormat, PageVectors, PageWords
from fineserve_jax.pallas_kernels.formats.packing import (
    pack_planar,
    settled,
    unpack_unsigned,
    words_to_f32,
)
from fineserve_jax.pallas_kernels.geometry import PageGeometry

CODES = 15
LOW_CODES, STEP_CODES = 127, 255
# Units are normal bf16 numbers, so that nothing divides by zero, and no range overflows.
SMALLEST_UNIT = 2.0**-100
LARGEST_VALUE = 2.0**96


class Ranges(NamedTuple):
    """Ranges of one page-head's vectors: value ~ low + step * code.

    Attributes:
        words: u16[..., kv_heads, pages, n], low and step codes.
        low_unit, step_unit: u16[..., kv_heads, pages], bf16 bits.
    """

    words: jax.Array
    low_unit: jax.Array
    step_unit: jax.Array

    def read(self) -> tuple[jax.Array, jax.Array]:
        """low and step, f32[..., kv_heads, pages, n]: 8 by 8 bits, so the products are exact."""
        low_code = lax.bitcast_convert_type(self.words, jnp.int16) >> 8
        step_code = self.words & 0xFF
        units = (words_to_f32(unit)[..., None] for unit in (self.low_unit, self.step_unit))
        low, step = (code.astype(jnp.float32) * unit for code, unit in zip((low_code, step_code), units, strict=True))
        return low, step


class Int4(KVFormat):
    name = "int4"
    value_bits = 4
    tail = "bf16"

    def aux_words(self, geometry: PageGeometry) -> int:
        return geometry.kv_heads * (geometry.head_dim + geometry.page_size + 4)

    def encode(self, geometry: PageGeometry, k: jax.Array, v: jax.Array) -> PageWords:
        k_codes, k_ranges = _quantise(self.to_basis(k), axis=-2)
        v_codes, v_ranges = _quantise(self.to_basis(v), axis=-1)
        return PageWords(pack_planar(k_codes, 4), pack_planar(v_codes, 4), _join(k_ranges, v_ranges))

    def unpack(self, geometry: PageGeometry, words: PageWords) -> PageVectors:
        k_ranges, v_ranges = _split(geometry, words.aux)
        k_low, k_step, v_low, v_step = settled(*k_ranges.read(), *v_ranges.read())
        planes = unpack_unsigned(words.k, 4)
        steps, lows = (jnp.split(part[..., None, :], len(planes), axis=-1) for part in (k_step, k_low))
        k = tuple(plane * step + low for plane, step, low in zip(planes, steps, lows, strict=True))
        return PageVectors(k, unpack_unsigned(words.v, 4), v_scale=v_step, v_offset=v_low)

    def to_basis(self, vectors: jax.Array) -> jax.Array:
        return jnp.matmul(vectors, _rotation(vectors.shape[-1]), precision=lax.Precision.HIGHEST)

    # A Hadamard matrix is symmetric: the rotation undoes itself.
    from_basis = to_basis


def _quantise(x: jax.Array, axis: int) -> tuple[jax.Array, Ranges]:
    """Codes i32 in [0, 15] of f32[..., kv_heads, pages, T, D], one range for all that lie along `axis` (-1 or -2)."""
    x = jnp.clip(x, -LARGEST_VALUE, LARGEST_VALUE)
    low, high = jnp.min(x, axis=axis), jnp.max(x, axis=axis)
    low_unit = _unit(jnp.max(jnp.abs(x), axis=(-1, -2)) / LOW_CODES)
    low_code = jnp.clip(jnp.floor(low / words_to_f32(low_unit)[..., None]), -LOW_CODES - 1, LOW_CODES)
    step = (high - low_code * words_to_f32(low_unit)[..., None]) / CODES
    step_unit = _unit(jnp.max(step, axis=-1) / STEP_CODES)
    step_code = jnp.clip(jnp.ceil(step / words_to_f32(step_unit)[..., None]), 1, STEP_CODES)
    words = low_code.astype(jnp.int32) << 8 | step_code.astype(jnp.int32)
    ranges = Ranges(words.astype(jnp.uint16), low_unit, step_unit)
    low, step = (jnp.expand_dims(part, axis) for part in ranges.read())
    return jnp.clip(jnp.round((x - low) / step), 0, CODES).astype(jnp.int32), ranges


def _unit(least: jax.Array) -> jax.Array:
    """Bits of the smallest bf16 that is no less than f32 `least`, a non-negative number."""
    bits = lax.bitcast_convert_type(jnp.maximum(least, SMALLEST_UNIT), jnp.uint32)
    return ((bits + 0xFFFF) >> 16).astype(jnp.uint16)


def _join(k: Ranges, v: Ranges) -> jax.Array:
    """u16[..., pages, aux_words]."""
    units = jnp.stack([k.low_unit, k.step_unit, v.low_unit, v.step_unit])
    units = jnp.moveaxis(units, (0, -1), (-2, -3))
    parts = [jnp.moveaxis(k.words, -2, -3), jnp.moveaxis(v.words, -2, -3), units]
    return jnp.concatenate([part.reshape(*part.shape[:-2], -1) for part in parts], axis=-1)


def _split(geometry: PageGeometry, aux: jax.Array) -> tuple[Ranges, Ranges]:
    """The inverse of `_join`."""
    heads = geometry.kv_heads
    sizes = (heads * geometry.head_dim, heads * geometry.page_size, 4 * heads)
    k, v, units = jnp.split(aux, np.cumsum(sizes)[:-1], axis=-1)
    units = jnp.moveaxis(units.reshape(*units.shape[:-1], 4, heads), (-2, -3), (0, -1))
    k, v = (jnp.moveaxis(part.reshape(*part.shape[:-1], heads, -1), -3, -2) for part in (k, v))
    return Ranges(k, units[0], units[1]), Ranges(v, units[2], units[3])


@functools.cache
def _rotation(head_dim: int) -> np.ndarray:
    """f32[head_dim, head_dim], orthogonal: Hadamard blocks as long as the largest power of two in `head_dim`."""
    block = math.gcd(head_dim, 1 << 30)
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < block:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    return np.kron(np.eye(head_dim // block, dtype=np.float32), hadamard / np.float32(math.sqrt(block)))
