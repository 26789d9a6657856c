"""Packing small integers into the lanes of 16-bit words, unpacking them, and reductions over vectors in packed lanes.

Word w of a vector of D values packed n to a word holds the values w, w + D/n, w + 2D/n, ... in its lanes, which are its
bits from the lowest up; so each of the n lanes unpacks to a contiguous slice of the vector.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.formats.base import PackedLanes


def pack_lanes(lanes: PackedLanes, bits: int) -> jax.Array:
    """Integers of which the lowest `bits` count, 16 / bits lanes of i32[..., width] -> u16[..., width]."""
    low = [lane & ((1 << bits) - 1) for lane in lanes]
    shifted = [lane << i * bits for i, lane in enumerate(low)]
    return functools.reduce(jnp.bitwise_or, shifted).astype(jnp.uint16)


def nearest_codes(values: jax.Array, least: int, most: int) -> jax.Array:
    """f32 values clipped to [least, most], within +-2**21, and rounded half to even: i32 codes.

    `jnp.round` has no lowering in Triton. An f32 of 1.5 * 2**23 has no bits left for a fraction, so adding it rounds as
    the hardware does, and leaves the code in the lowest bits.
    """
    shift = 1.5 * 2**23
    bits = lax.bitcast_convert_type(jnp.clip(values, least, most) + jnp.float32(shift), jnp.int32)
    return bits - int(np.float32(shift).view(np.int32))


def unpack_unsigned(words: jax.Array, bits: int) -> PackedLanes:
    """u16[..., width] -> the lanes, f32[..., width] each, of integers in [0, 2**bits)."""
    wide = words.astype(jnp.int32)
    return tuple((wide >> shift & (1 << bits) - 1).astype(jnp.float32) for shift in range(0, 16, bits))


def unpack_signed(words: jax.Array, bits: int) -> PackedLanes:
    """u16[..., width] -> the lanes, f32[..., width] each, of integers in [-2**(bits-1), 2**(bits-1))."""
    wide = words.astype(jnp.int32)
    shifts = range(0, 16, bits)
    return tuple((wide << (32 - bits - shift) >> (32 - bits)).astype(jnp.float32) for shift in shifts)


def pack_codes(lanes: PackedLanes, bits: int) -> PackedLanes:
    """Codes of `bits` bits, lanes of i32[..., width], as word parts: one, or of 3 bits 16 lanes as three.

    Three bits fill no word evenly. The first two parts have the lower two bits of 8 lanes each, the third the highest
    bits of all.
    """
    if 16 % bits == 0:
        return (pack_lanes(lanes, bits),)
    return pack_lanes(lanes[:8], 2), pack_lanes(lanes[8:], 2), pack_lanes(tuple(code >> 2 for code in lanes), 1)


def unpack_codes(parts: PackedLanes, bits: int) -> PackedLanes:
    """The inverse of `pack_codes`, as f32."""
    if 16 % bits == 0:
        return unpack_unsigned(parts[0], bits)
    *lower, highest = (part.astype(jnp.int32) for part in parts)
    codes = ((lower[i // 8] >> 2 * (i % 8) & 3) | (highest >> i & 1) << 2 for i in range(16))
    return tuple(code.astype(jnp.float32) for code in codes)


def largest(lanes: PackedLanes) -> jax.Array:
    """The largest value of each vector, f32[..., 1]."""
    return jnp.max(functools.reduce(jnp.maximum, lanes), axis=-1, keepdims=True)


def smallest(lanes: PackedLanes) -> jax.Array:
    """The smallest value of each vector, f32[..., 1]."""
    return -largest(tuple(-lane for lane in lanes))


def bf16_to_words(values: jax.Array) -> jax.Array:
    """Rounds to bf16 and gives the bits, u16."""
    return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)


def words_to_f32(words: jax.Array) -> jax.Array:
    """bf16 bits, u16 -> the number, f32. (A bf16 is the upper half of an f32.)"""
    return lax.bitcast_convert_type(words.astype(jnp.uint32) << 16, jnp.float32)
