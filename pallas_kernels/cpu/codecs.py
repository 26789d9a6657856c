"""Which KV formats the compiled kernels read, and where in a page they look: `codecs.h` has the code."""

import math
from collections.abc import Sequence

import numpy as np

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.formats.fp8 import Float8KV
from fineserve_jax.pallas_kernels.formats.int4 import Int4KV
from fineserve_jax.pallas_kernels.formats.int8 import Int8KV
from fineserve_jax.pallas_kernels.formats.wide import BFloat16KV, Float16KV, Float32KV
from fineserve_jax.pallas_kernels.geometry import PageGeometry

CODECS: dict[type[KVFormat], int] = {Float32KV: 0, BFloat16KV: 1, Float16KV: 2, Int8KV: 3, Float8KV: 4, Int4KV: 5}
"""Of each class, the number of its codec in `interface.h`. A subclass may decode otherwise, and so is none of these."""
NO_CODEC = -1
MAX_SCALE_ARRAYS = 9


def has_codec(kv_format: KVFormat) -> bool:
    """Whether the compiled kernels can read pages of that format."""
    return type(kv_format) in CODECS


def layouts(formats: Sequence[KVFormat], geometry: PageGeometry) -> dict[str, np.ndarray]:
    """What `fineserve_attend` is told of the formats: i64[formats] each, `scale_starts` i64[9 * formats]."""
    starts = np.zeros((len(formats), MAX_SCALE_ARRAYS), np.int64)
    for own, kv_format in zip(starts, formats, strict=True):
        if has_codec(kv_format):
            own[: len(kv_format.scales)] = kv_format.scale_starts(geometry)
    return {
        "codecs": np.array([CODECS.get(type(f), NO_CODEC) for f in formats], np.int64),
        "layer_words": np.array([f.units_per_layer(geometry) * geometry.unit_words for f in formats], np.int64),
        "vector_words": np.array([f.vector_words(geometry) for f in formats], np.int64),
        "scale_starts": starts.reshape(-1),
    }


def rotation_block(head_dim: int) -> int:
    """Length of the Hadamard blocks by which int4 is rotated: see `formats.int4.hadamard`."""
    return math.gcd(head_dim, 1 << 30)
