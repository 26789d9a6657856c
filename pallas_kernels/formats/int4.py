"""int4: keys by channel, values by token, both in a rotated basis, all scales in 8 bits.

Keys have channels that stay far from zero over many tokens, so a range per channel over a page's tokens costs far less
than one per token (KIVI, arXiv 2402.02750); that needs the whole page, and the newest tokens stay in int8 until then.
Values have no such channels: a range per token serves them. A Hadamard rotation of the head's channels (QuaRot, arXiv
2404.00456) spreads outliers, of keys too, whose channels then need ranges of about the same size.

A range is two 8-bit numbers, `low` and `step`, in units that the page and head share. A layer of a page:

    | K, 4 bits | V, 4 bits | K ranges        | V ranges        | units                          |
      see PageGeometry        4 planes of       kv_heads x T      kv_heads bf16 each:
                              kv_heads x D/4    low << 8 | step   K low, K step, V low, V step
                              low << 8 | step
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import Int4Sizes
from fineserve_jax.pallas_kernels.formats.base import KVFormat, PageVectors, PageWords, Planes
from fineserve_jax.pallas_kernels.formats.bit_packing import (
    largest,
    nearest_codes,
    pack_planar,
    smallest,
    unpack_unsigned,
    words_to_f32,
)

CODES = 15
LOW_CODES, STEP_CODES = 127, 255
# Units are normal bf16 numbers, so that nothing divides by zero, and no range overflows.
SMALLEST_UNIT = 2.0**-100
LARGEST_VALUE = 2.0**96


class Ranges(NamedTuple):
    """Ranges of one page-head's vectors: value ~ low + step * code.

    Attributes:
        words: u16[...] each, low and step codes: one array for all values, or one for each plane.
        low_unit, step_unit: u16[..., 1, 1], bf16 bits.
    """

    words: Planes
    low_unit: jax.Array
    step_unit: jax.Array

    def read(self) -> tuple[Planes, Planes]:
        """low and step, f32 of the shapes of `words`: 8 by 8 bits, so the products are exact."""
        low_unit, step_unit = words_to_f32(self.low_unit), words_to_f32(self.step_unit)
        signed = [words.astype(jnp.int32) << 16 >> 24 for words in self.words]
        low = tuple(codes.astype(jnp.float32) * low_unit for codes in signed)
        step = tuple((words.astype(jnp.int32) & 0xFF).astype(jnp.float32) * step_unit for words in self.words)
        return low, step


class Int4(Int4Sizes, KVFormat):
    """4-bit codes of rotated vectors under ranges in 8 bits."""

    def encode(self, k: Planes, v: Planes) -> PageWords:
        k, v = (tuple(jnp.clip(plane, -LARGEST_VALUE, LARGEST_VALUE) for plane in part) for part in (k, v))
        k_low, k_high = ([reduce(plane, axis=-2, keepdims=True) for plane in k] for reduce in (jnp.min, jnp.max))
        k_ranges = _choose_ranges(tuple(k_low), tuple(k_high))
        v_ranges = _choose_ranges((smallest(v),), (largest(v),))
        units = (k_ranges.low_unit, k_ranges.step_unit, v_ranges.low_unit, v_ranges.step_unit)
        k_words, v_words = (pack_planar(_codes(part, ranges), 4) for part, ranges in ((k, k_ranges), (v, v_ranges)))
        return PageWords((k_words,), (v_words,), (*k_ranges.words, *v_ranges.words, *units))

    def read_aux(self, aux: Planes) -> Planes:
        *k_words, v_words, k_low_unit, k_step_unit, v_low_unit, v_step_unit = aux
        lows, steps = Ranges(tuple(k_words), k_low_unit, k_step_unit).read()
        v_low, v_step = Ranges((v_words,), v_low_unit, v_step_unit).read()
        return (*lows, *steps, *v_low, *v_step)

    def unpack(self, k: Planes, v: Planes, numbers: Planes) -> PageVectors:
        lows, steps, (v_low, v_step) = numbers[:4], numbers[4:8], numbers[8:]
        codes = unpack_unsigned(k[0], 4)
        planes = tuple(code * step + low for code, step, low in zip(codes, steps, lows, strict=True))
        return PageVectors(planes, unpack_unsigned(v[0], 4), v_scale=v_step, v_offset=v_low)

    def rotation(self, head_dim: int) -> np.ndarray:
        return hadamard(head_dim)


def _choose_ranges(lows: Planes, highs: Planes) -> Ranges:
    """8-bit ranges that hold f32 [lows, highs], of one page and head over the last two axes."""

    def over_page(planes: list[jax.Array]) -> jax.Array:
        return jnp.max(largest(tuple(planes)), axis=-2, keepdims=True)

    reach = [jnp.maximum(jnp.abs(low), jnp.abs(high)) for low, high in zip(lows, highs, strict=True)]
    low_unit = _unit(over_page(reach) / LOW_CODES)
    unit = words_to_f32(low_unit)
    low_codes = [jnp.clip(jnp.floor(low / unit), -LOW_CODES - 1, LOW_CODES) for low in lows]
    wanted = [(high - code * unit) / CODES for high, code in zip(highs, low_codes, strict=True)]
    step_unit = _unit(over_page(wanted) / STEP_CODES)
    unit = words_to_f32(step_unit)
    step_codes = [jnp.clip(jnp.ceil(step / unit), 1, STEP_CODES) for step in wanted]
    words = [
        ((low.astype(jnp.int32) & 0xFF) << 8 | step.astype(jnp.int32)).astype(jnp.uint16)
        for low, step in zip(low_codes, step_codes, strict=True)
    ]
    return Ranges(tuple(words), low_unit, step_unit)


def _codes(planes: Planes, ranges: Ranges) -> Planes:
    """Codes i32 in [0, 15] of f32[..., T, width] planes; `ranges` are each plane's, or one for all."""
    lows, steps = (part * (len(planes) // len(part)) for part in ranges.read())
    return tuple(
        nearest_codes((plane - low) / step, 0, CODES) for plane, low, step in zip(planes, lows, steps, strict=True)
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
