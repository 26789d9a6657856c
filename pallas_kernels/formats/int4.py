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
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import Int4KeySizes, Int4ValueSizes
from fineserve_jax.pallas_kernels.formats.base import Codec, EncodedVectors, PackedLanes, UnpackedVectors
from fineserve_jax.pallas_kernels.formats.bit_packing import (
    largest,
    nearest_codes,
    pack_codes,
    smallest,
    unpack_codes,
    words_to_f32,
)

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


class RotatedCodec(Codec):
    """Codes of `value_bits` of vectors that are rotated."""

    def rotation(self, head_dim: int) -> np.ndarray:
        return hadamard(head_dim)

    @property
    def largest_code(self) -> int:
        return (1 << self.value_bits) - 1

    def _encoded(self, lanes: PackedLanes, lows: PackedLanes, highs: PackedLanes) -> EncodedVectors:
        """Codes of f32[..., T, width] lanes between `lows` and `highs`, which are each lane's, or one for all."""
        chosen = _choose_scales(lows, highs, self.largest_code)
        zero_points, scales = (part * (len(lanes) // len(part)) for part in chosen.read())
        codes = tuple(
            nearest_codes((lane - zero_point) / scale, 0, self.largest_code)
            for lane, zero_point, scale in zip(lanes, zero_points, scales, strict=True)
        )
        words = pack_codes(codes, self.value_bits)
        return EncodedVectors(words, (*chosen.words, chosen.zero_point_unit, chosen.scale_unit))


class ChannelRanges(RotatedCodec):
    """Scales and zero points by channel."""

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        lanes = _clipped(lanes)
        lows, highs = (tuple(reduce(lane, axis=-2, keepdims=True) for lane in lanes) for reduce in (jnp.min, jnp.max))
        return self._encoded(lanes, lows, highs)

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        zero_points, lane_scales = _read_ranges(scales)
        return (*zero_points, *lane_scales)

    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        zero_points, lane_scales = scales[: self.packed_lanes], scales[self.packed_lanes :]
        codes = zip(unpack_codes(words, self.value_bits), lane_scales, zero_points, strict=True)
        return UnpackedVectors(tuple(code * scale + zero_point for code, scale, zero_point in codes))


class TokenRanges(RotatedCodec):
    """Scales and zero points by token."""

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        lanes = _clipped(lanes)
        return self._encoded(lanes, (smallest(lanes),), (largest(lanes),))

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        (zero_point,), (scale,) = _read_ranges(scales)
        return zero_point, scale

    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        zero_point, scale = scales
        return UnpackedVectors(unpack_codes(words, self.value_bits), scale, zero_point)


class Int4KeyCodec(Int4KeySizes, ChannelRanges):
    """Keys of int4."""


class Int4ValueCodec(Int4ValueSizes, TokenRanges):
    """Values of int4."""


def _read_ranges(scales: PackedLanes) -> tuple[PackedLanes, PackedLanes]:
    """Zero points and scales, f32, of `ScalesAndZeroPoints` as they are kept: words, then the units of both."""
    *words, zero_point_unit, scale_unit = scales
    zero_points, lane_scales = ScalesAndZeroPoints(tuple(words), zero_point_unit, scale_unit).read()
    return zero_points, lane_scales


def _clipped(lanes: PackedLanes) -> PackedLanes:
    return tuple(jnp.clip(lane, -LARGEST_VALUE, LARGEST_VALUE) for lane in lanes)


def _choose_scales(lows: PackedLanes, highs: PackedLanes, codes: int) -> ScalesAndZeroPoints:
    """8-bit scales and zero points whose codes, 0 to `codes`, reach f32 [lows, highs], of one page and head over the
    last two axes."""
    reach = [jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in zip(lows, highs, strict=True)]
    zero_point_unit = _unit(_over_page(reach) / ZERO_POINT_CODES)
    unit = words_to_f32(zero_point_unit)
    zero_points = [jnp.clip(jnp.floor(low / unit), -ZERO_POINT_CODES - 1, ZERO_POINT_CODES) for low in lows]
    wanted = [(high - code * unit) / codes for high, code in zip(highs, zero_points, strict=True)]
    scale_unit = _unit(_over_page(wanted) / SCALE_CODES)
    unit = words_to_f32(scale_unit)
    scales = [jnp.clip(jnp.ceil(scale / unit), 1, SCALE_CODES) for scale in wanted]
    words = [
        ((zero_point.astype(jnp.int32) & 0xFF) << 8 | scale.astype(jnp.int32)).astype(jnp.uint16)
        for zero_point, scale in zip(zero_points, scales, strict=True)
    ]
    return ScalesAndZeroPoints(tuple(words), zero_point_unit, scale_unit)


def _over_page(lanes: Sequence[jax.Array]) -> jax.Array:
    """The largest value of each page and head, f32[..., 1, 1]."""
    return jnp.max(largest(tuple(lanes)), axis=-2, keepdims=True)


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
