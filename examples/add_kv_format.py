"""Adds a KV format, int2, and compares it with those there are.

    python examples/add_kv_format.py TEXT_FILE

A format is a codec of keys and one of values. Once it is registered, requests can name it, and pair its codecs with
others (`k8v2`): pools, scheduler, attention kernels and command line take it from the registry. A codec's code is
elementwise, so that it also runs inside kernels, on parts of a page.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax import (
    KV_FORMATS,
    Codec,
    EncodedVectors,
    Engine,
    EngineConfig,
    Granularity,
    KVFormat,
    PackedLanes,
    UnpackedVectors,
    bit_packing,
    load_model,
    measure_perplexity,
    register_kv_format,
)

LANES = 8  # values that share a 16-bit word
SMALLEST_SCALE = 2.0**-100


class Rotated2Bit(Codec):
    """Four levels a value; vectors rotated as in int4, which makes their channels nearly normal."""

    name, value_bits = "int2", 2
    residual = "bf16"  # in which tokens are kept until their page is full

    def rotation(self, head_dim: int) -> np.ndarray | None:
        return KV_FORMATS["int4"].key.rotation(head_dim)

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        return tuple(bit_packing.words_to_f32(words) for words in scales)


class Keys(Rotated2Bit):
    """Levels from the smallest to the largest number of each channel in a page; the smallest is the zero point."""

    scales = (Granularity.CHANNEL,) * 2 * LANES  # of each packed lane its zero points, then of each its scales

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        low, high = (tuple(reduce(lane, -2, keepdims=True) for lane in lanes) for reduce in (jnp.min, jnp.max))
        zero_points = tuple(bit_packing.bf16_to_words(lane) for lane in low)
        extents = (top - bit_packing.words_to_f32(bottom) for top, bottom in zip(high, zero_points, strict=True))
        scales = tuple(_scale_words(extent / 3) for extent in extents)
        return EncodedVectors(
            (_words(lanes, self.read_scales(zero_points), self.read_scales(scales)),), zero_points + scales
        )

    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        levels = zip(bit_packing.unpack_unsigned(words[0], 2), scales[LANES:], scales[:LANES], strict=True)
        return UnpackedVectors(tuple(level * scale + zero_point for level, scale, zero_point in levels))


class Values(Rotated2Bit):
    """scale * (-1.5, -0.5, 0.5, 1.5), one scale a token.

    The best scale for normal numbers is their standard deviation (Max, 1960), and the largest of 64 to 128 of them is
    about 2.5 of these.
    """

    scales = (Granularity.TOKEN,)

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        scale_words = _scale_words(bit_packing.largest(tuple(jnp.abs(lane) for lane in lanes)) / 2.5)
        scale = bit_packing.words_to_f32(scale_words)
        return EncodedVectors((_words(lanes, (-1.5 * scale,) * LANES, (scale,) * LANES),), (scale_words,))

    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        return UnpackedVectors(tuple(level - 1.5 for level in bit_packing.unpack_unsigned(words[0], 2)), *scales)


def _scale_words(scale: jax.Array) -> jax.Array:
    return bit_packing.bf16_to_words(jnp.maximum(scale, SMALLEST_SCALE))


def _words(lanes: PackedLanes, zero_points: PackedLanes, scales: PackedLanes) -> jax.Array:
    """The words of f32 lanes, whose levels fit scales as they are kept."""
    levels = (
        bit_packing.nearest_codes((lane - zero_point) / scale, 0, 3)
        for lane, zero_point, scale in zip(lanes, zero_points, scales, strict=True)
    )
    return bit_packing.pack_lanes(tuple(levels), 2)


def main(text: str) -> None:
    register_kv_format(KVFormat(Keys(), Values()))
    model = load_model("smollm2-135m", "bf16")
    tokens = model.tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)
    for kv_precision in ("bf16", "int4", "k8v2", "int2"):
        engine = Engine(model, EngineConfig(kv_precision=kv_precision, max_batch_size=1, max_seq_len=512))
        print(measure_perplexity(engine, tokens, window=512, windows=2))


if __name__ == "__main__":
    main(sys.argv[1])
