"""int8: symmetric integers under one bf16 scale per token and head."""

import jax

from fineserve_jax.pallas_kernels.format_sizes import Int8Sizes
from fineserve_jax.pallas_kernels.formats.base import PackedLanes
from fineserve_jax.pallas_kernels.formats.bit_packing import nearest_codes, unpack_signed
from fineserve_jax.pallas_kernels.formats.scaled import ScaledCodec

LARGEST = 127


class Int8Codec(Int8Sizes, ScaledCodec):
    """Codes are the integers in [-127, 127]."""

    largest_code = LARGEST

    def to_codes(self, values: jax.Array) -> jax.Array:
        return nearest_codes(values, -LARGEST, LARGEST)

    def from_words(self, words: jax.Array) -> PackedLanes:
        return unpack_signed(words, 8)
