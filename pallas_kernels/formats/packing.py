"""Small integers in 16-bit words, planar.

Word w of a vector of D values packed n to a word holds the values w, w + D/n, w + 2D/n, ... in its bits from the
lowest up, so each of the n planes unpacks to a contiguous slice of the vector.
"""

import jax
import jax.numpy as jnp
from jax import lax


def pack_planar(values: jax.Array, bits: int) -> jax.Array:
    """Packs the last axis. `values`: integers of which the lowest `bits` count, [..., D] -> u16[..., D * bits / 16]."""
    planes = 16 // bits
    width = values.shape[-1] // planes
    low = values.astype(jnp.uint16) & jnp.uint16((1 << bits) - 1)
    word = low[..., :width]
    for plane in range(1, planes):
        word |= low[..., plane * width : (plane + 1) * width] << jnp.uint16(plane * bits)
    return word


def unpack_unsigned(words: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """u16[..., W] -> the planes, f32[..., W] each, of integers in [0, 2**bits)."""
    wide = words.astype(jnp.int32)
    return tuple((wide >> shift & (1 << bits) - 1).astype(jnp.float32) for shift in range(0, 16, bits))


def unpack_signed(words: jax.Array, bits: int) -> tuple[jax.Array, ...]:
    """u16[..., W] -> the planes, f32[..., W] each, of integers in [-2**(bits-1), 2**(bits-1))."""
    wide = words.astype(jnp.int32)
    shifts = range(0, 16, bits)
    return tuple((wide << (32 - bits - shift) >> (32 - bits)).astype(jnp.float32) for shift in shifts)


def settled(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """The same arrays, computed once. XLA would fuse them into their use, and compute a scale again for each value."""
    return lax.optimization_barrier(arrays)


def bf16_to_words(values: jax.Array) -> jax.Array:
    """Rounds to bf16 and gives the bits, u16."""
    return lax.bitcast_convert_type(values.astype(jnp.bfloat16), jnp.uint16)


def words_to_f32(words: jax.Array) -> jax.Array:
    """bf16 bits, u16 -> the number, f32. (A bf16 is the upper half of an f32.)"""
    return lax.bitcast_convert_type(words.astype(jnp.uint32) << 16, jnp.float32)
