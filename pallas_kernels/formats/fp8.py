"""fp8: e4m3, 4 bits of exponent and 3 of mantissa, under one bf16 scale per token and head.

e4m3 reaches from 2**-9 to 448 and is precise to one part in 16 from 2**-6 on only: keys of some models would saturate,
and small values of others would vanish. The scale puts the largest number of each vector at 448, so that nothing
saturates and all that is down to 28,672 times smaller keeps its relative precision. int8, of the same size, is finer
for numbers near the vector's largest and coarser for small ones: there an outlier costs its neighbours their
precision, here it does not.

All by arithmetic on f32 and i32: not every chip that runs the kernels converts 8-bit floats.
"""

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import Float8Sizes
from fineserve_jax.pallas_kernels.formats.base import PackedLanes
from fineserve_jax.pallas_kernels.formats.scaled import ScaledCodec

LARGEST = 448.0
SMALLEST_NORMAL = 2.0**-6
SUBNORMAL_STEP = 2.0**-9

DROPPED_BITS = 20  # of f32's 23 bits of mantissa
ROUND_UP = (1 << DROPPED_BITS - 1) - 1  # one less than half of what is dropped
BIAS = 127 - 7  # of f32's exponent over e4m3's
# From here to twice as far, f32 numbers are the multiples of SUBNORMAL_STEP.
GRID = 2.0**14
GRID_BITS = 0x4680_0000


class Float8Codec(Float8Sizes, ScaledCodec):
    """Codes are e4m3 numbers."""

    largest_code = LARGEST

    def to_codes(self, values: jax.Array) -> jax.Array:
        return f32_to_e4m3(values)

    def from_words(self, words: jax.Array) -> PackedLanes:
        wide = words.astype(jnp.int32)
        return e4m3_to_f32(wide), e4m3_to_f32(wide >> 8)


def f32_to_e4m3(values: jax.Array) -> jax.Array:
    """The codes, i32 in [0, 256), of the nearest e4m3 numbers: ties to even, saturating at 448. Not for NaN."""
    sign = lax.bitcast_convert_type(values, jnp.int32) >> 24 & 0x80
    magnitude = jnp.minimum(jnp.abs(values), LARGEST)
    bits = lax.bitcast_convert_type(magnitude, jnp.int32)
    odd = bits >> DROPPED_BITS & 1
    normal = (bits + ROUND_UP + odd >> DROPPED_BITS) - (BIAS << 3)
    # The sum is rounded to the grid, ties to even, by the addition itself.
    subnormal = lax.bitcast_convert_type(magnitude + GRID, jnp.int32) - GRID_BITS
    return sign | jnp.where(magnitude < SMALLEST_NORMAL, subnormal, normal)


def e4m3_to_f32(codes: jax.Array) -> jax.Array:
    """The numbers, f32, of e4m3 codes, the lowest 8 bits of i32.

    The two codes of NaN, which nothing writes, read as 480 and -480: whatever lies in a page is finite.
    """
    magnitude = codes & 0x7F
    subnormal = magnitude.astype(jnp.float32) * SUBNORMAL_STEP
    normal = lax.bitcast_convert_type((magnitude << DROPPED_BITS) + (BIAS << 23), jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(magnitude < 8, subnormal, normal), jnp.int32)
    return lax.bitcast_convert_type(bits | (codes & 0x80) << 24, jnp.float32)
