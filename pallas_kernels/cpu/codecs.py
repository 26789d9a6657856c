"""Which codecs the compiled kernels read, and where in a page they look: `codecs.h` has the code."""

import math
from collections.abc import Sequence

import numpy as np

from fineserve_jax.pallas_kernels.formats import KEYS, VALUES, Codec, KVFormat
from fineserve_jax.pallas_kernels.formats.fp8 import Float8Codec
from fineserve_jax.pallas_kernels.formats.int4 import Int4KeyCodec, Int4ValueCodec
from fineserve_jax.pallas_kernels.formats.int8 import Int8Codec
from fineserve_jax.pallas_kernels.formats.wide import BFloat16Codec, Float16Codec, Float32Codec
from fineserve_jax.pallas_kernels.geometry import PageGeometry

OF_BOTH: dict[type[Codec], int] = {Float32Codec: 0, BFloat16Codec: 1, Float16Codec: 2, Int8Codec: 3, Float8Codec: 4}
CODECS: tuple[dict[type[Codec], int], ...] = (OF_BOTH | {Int4KeyCodec: 5}, OF_BOTH | {Int4ValueCodec: 5})
"""Of each class of codecs of keys, and of values, its number in `interface.h`. A subclass may decode otherwise, so it
is none of these."""
NO_CODEC = -1
MAX_SCALE_ARRAYS = 6


def has_codec(kv_format: KVFormat) -> bool:
    """Whether the compiled kernels can read pages of that format."""
    return all(type(codec) in known for codec, known in zip(kv_format.sides, CODECS, strict=True))


def layouts(formats: Sequence[KVFormat], geometry: PageGeometry) -> dict[str, np.ndarray]:
    """What `fineserve_attend` is told of the formats: `layer_words`, i64[formats]; `keys` and `values`, of each format
    its codec, where they begin in a layer, words of a vector, and where 6 scale arrays begin, i64[9 * formats]."""
    return {
        "layer_words": np.array([f.units_per_layer(geometry) * geometry.unit_words for f in formats], np.int64),
        "keys": np.array([_side(kv_format, KEYS, geometry) for kv_format in formats], np.int64).reshape(-1),
        "values": np.array([_side(kv_format, VALUES, geometry) for kv_format in formats], np.int64).reshape(-1),
    }


def _side(kv_format: KVFormat, side: int, geometry: PageGeometry) -> list[int]:
    codec, starts = kv_format.sides[side], kv_format.scale_starts(geometry)[side]
    number = CODECS[side].get(type(codec), NO_CODEC)
    starts = starts if number != NO_CODEC else ()
    sizes = (number, kv_format.block_starts(geometry)[side], codec.vector_words(geometry))
    return [*sizes, *starts, *[0] * (MAX_SCALE_ARRAYS - len(starts))]


def rotation_block(head_dim: int) -> int:
    """Length of the Hadamard blocks by which int4 is rotated: see `formats.int4.hadamard`."""
    return math.gcd(head_dim, 1 << 30)
