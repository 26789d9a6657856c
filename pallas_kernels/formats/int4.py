"""int4: keys by channel, values by token, both rotated, all scales and zero points in 8 bits.

Keys have channels that stay far from zero over many tokens, so a scale and a zero point per channel over a page's
tokens cost far less than those per token (KIVI, arXiv 2402.02750); that needs the whole page, and the newest tokens
stay in int8 until then. Values have no such channels: scales per token serve them. A Hadamard rotation of the head's
channels (QuaRot, arXiv 2404.00456) spreads outliers, of keys too, whose channels then need scales of about the same
size.

A zero point is the number that code 0 stands for. Zero points and scales are 8-bit multiples of units that the page and
head share. A layer of a page:

    | K, 4 bits | V, 4 bits | K, by channel     | V, by token           | units                                |
      see PageGeometry        4 lanes of          kv_heads x T            kv_heads bf16 each:
                              kv_heads x D/4      zero point << 8 | scale K zero point, K scale, V zero point, V scale
                              zero point << 8 | scale
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import Int4Sizes
from fineserve_jax.pallas_kernels.formats.base import KVFormat, PackedLanes, PageVectors, PageWords
from fineserve_jax.pallas_kernels.formats.bit_packing import (
    largest,
    nearest_codes,
    pack_lanes,
    smallest,
    unpack_unsigned,
    words_to_f32,
)

CODES = 15
ZERO_POINT_CODES, SCALE_CODES = 127, 255
# Units are normal bf16 numbers, so that nothing divides by zero, and no scale overflows.
SMALLEST_UNIT = 2.0**-100
LARGEST_VALUE = 2.0**96


class ScalesAndZeroPoints(NamedTuple):
    """Those of one page-head's keys or values: value ~ zero point + scale * code.

    Attributes:
        words: u16[...] each, `zero point << 8 | scale` as codes: one array for all values, or one for each packed lane.
        zero_point_unit, scale_unit: u16[..., 1, 1], bf16 bits.
    """

    words: PackedLanes
    zero_point_unit: jax.Array
    scale_unit: jax.Array

    def read(self) -> tuple[PackedLanes, PackedLanes]:
        """Zero points and scales, f32 of the shapes of `words`: 8 by 8 bits, so the products are exact."""
        zero_point_unit, scale_unit = words_to_f32(self.zero_point_unit), words_to_f32(self.scale_unit)
        signed = [words.astype(jnp.int32) << 16 >> 24 for words in self.words]
        zero_points = tuple(codes.astype(jnp.float32) * zero_point_unit for codes in signed)
        scales = tuple((words.astype(jnp.int32) & 0xFF).astype(jnp.float32) * scale_unit for words in self.words)
        return zero_points, scales


class Int4KV(Int4Sizes, KVFormat):
    """4-bit codes of rotated vectors; keys have scales and zero points by channel, values by token."""

    def encode(self, k: PackedLanes, v: PackedLanes) -> PageWords:
        k, v = (tuple(jnp.clip(lane, -LARGEST_VALUE, LARGEST_VALUE) for lane in part) for part in (k, v))
        k_low, k_high = ([reduce(lane, axis=-2, keepdims=True) for lane in k] for reduce in (jnp.min, jnp.max))
        of_k = _choose_scales(tuple(k_low), tuple(k_high))
        of_v = _choose_scales((smallest(v),), (largest(v),))
        units = (of_k.zero_point_unit, of_k.scale_unit, of_v.zero_point_unit, of_v.scale_unit)
        k_words, v_words = (pack_lanes(_codes(part, scales), 4) for part, scales in ((k, of_k), (v, of_v)))
        return PageWords((k_words,), (v_words,), (*of_k.words, *of_v.words, *units))

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        *k_words, v_words, k_zero_point_unit, k_scale_unit, v_zero_point_unit, v_scale_unit = scales
        k_zero_points, k_scales = ScalesAndZeroPoints(tuple(k_words), k_zero_point_unit, k_scale_unit).read()
        v_zero_point, v_scale = ScalesAndZeroPoints((v_words,), v_zero_point_unit, v_scale_unit).read()
        return (*k_zero_points, *k_scales, *v_zero_point, *v_scale)

    def unpack(self, k: PackedLanes, v: PackedLanes, scales: PackedLanes) -> PageVectors:
        k_zero_points, k_scales, (v_zero_point, v_scale) = scales[:4], scales[4:8], scales[8:]
        codes = zip(unpack_unsigned(k[0], 4), k_scales, k_zero_points, strict=True)
        keys = tuple(code * scale + zero_point for code, scale, zero_point in codes)
        return PageVectors(keys, unpack_unsigned(v[0], 4), v_scale=v_scale, v_zero_point=v_zero_point)

    def rotation(self, head_dim: int) -> np.ndarray:
        return hadamard(head_dim)


def _choose_scales(lows: PackedLanes, highs: PackedLanes) -> ScalesAndZeroPoints:
    """8-bit scales and zero points whose codes reach f32 [lows, highs], of one page and head over the last two axes."""

    def over_page(lanes: list[jax.Array]) -> jax.Array:
        return jnp.max(largest(tuple(lanes)), axis=-2, keepdims=True)

    reach = [jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in zip(lows, highs, strict=True)]
    zero_point_unit = _unit(over_page(reach) / ZERO_POINT_CODES)
    unit = words_to_f32(zero_point_unit)
    zero_points = [jnp.clip(jnp.floor(low / unit), -ZERO_POINT_CODES - 1, ZERO_POINT_CODES) for low in lows]
    wanted = [(high - code * unit) / CODES for high, code in zip(highs, zero_points, strict=True)]
    scale_unit = _unit(over_page(wanted) / SCALE_CODES)
    unit = words_to_f32(scale_unit)
    scales = [jnp.clip(jnp.ceil(scale / unit), 1, SCALE_CODES) for scale in wanted]
    words = [
        ((zero_point.astype(jnp.int32) & 0xFF) << 8 | scale.astype(jnp.int32)).astype(jnp.uint16)
        for zero_point, scale in zip(zero_points, scales, strict=True)
    ]
    return ScalesAndZeroPoints(tuple(words), zero_point_unit, scale_unit)


def _codes(lanes: PackedLanes, scales: ScalesAndZeroPoints) -> PackedLanes:
    """Codes i32 in [0, 15] of f32[..., T, width] lanes; `scales` are each lane's, or one for all."""
    zero_points, lane_scales = (part * (len(lanes) // len(part)) for part in scales.read())
    return tuple(
        nearest_codes((lane - zero_point) / scale, 0, CODES)
        for lane, zero_point, scale in zip(lanes, zero_points, lane_scales, strict=True)
    )


def _unit(least: jax.Array) -> jax.Array:
    """Bits of the smallest bf16 that is no less than f32 `least`, a non-negative number."""
    bits = lax.bitcast_convert_type(jnp.maximum(least, SMALLEST_UNIT), jnp.uint32)
    return ((bits + 0xFFFF) >> 16).astype(jnp.uint16)


@functools.cache
def hadamard(head_dim: int) -> np.ndarray:
    """f32[head_dim, head_dim], orthogonal: Hadamard blocks as long as the largest power of two in `head_dim`."""
    block = math.gcd(head_dim, 1 << 30)
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < block:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return np.kron(np.eye(head_dim // block, dtype=np.float32), matrix / np.float32(math.sqrt(block)))
