"""Adds a KV format, int2, and compares it with those there are.

    python examples/add_kv_format.py TEXT_FILE

A format is a codec. Once it is registered, requests can name it: pools, scheduler, attention kernels and command line
take it from the registry. Its code is elementwise, so that it also runs inside kernels, on parts of a page.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax import (
    KV_FORMATS,
    Engine,
    EngineConfig,
    Granularity,
    KVFormat,
    PackedLanes,
    PageVectors,
    PageWords,
    bit_packing,
    load_model,
    measure_perplexity,
    register_kv_format,
)

LANES = 8  # values that share a 16-bit word
SMALLEST_SCALE = 2.0**-100


class Int2(KVFormat):
    """Four levels a value; vectors rotated as in int4, which makes their channels nearly normal.

    Keys: levels from the smallest to the largest number of each channel in a page; the smallest is the zero point.
    Values: scale * (-1.5, -0.5, 0.5, 1.5), one scale a token. The best scale for normal numbers is their standard
    deviation (Max, 1960), and the largest of 64 to 128 of them is about 2.5 of these.
    """

    name = "int2"
    value_bits = 2
    # Of each packed lane of K its zero points, then of each its scales; then the scales of V.
    scales = (*[Granularity.CHANNEL] * 2 * LANES, Granularity.TOKEN)
    residual = "bf16"  # scales by channel take a whole page; until it is full, its tokens are kept so

    def encode(self, k: PackedLanes, v: PackedLanes) -> PageWords:
        zero_point_words = [bit_packing.bf16_to_words(jnp.min(lane, axis=-2, keepdims=True)) for lane in k]
        zero_points = [bit_packing.words_to_f32(words) for words in zero_point_words]
        pairs = zip(k, zero_points, strict=True)
        extents = [jnp.max(lane, axis=-2, keepdims=True) - zero_point for lane, zero_point in pairs]
        k_words, k_scales = _quantize(k, zero_points, [extent / 3 for extent in extents])
        scale = bit_packing.largest(tuple(jnp.abs(lane) for lane in v)) / 2.5
        v_words, v_scales = _quantize(v, [-1.5 * scale] * LANES, [scale])
        return PageWords((k_words,), (v_words,), (*zero_point_words, *k_scales, *v_scales))

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        return tuple(bit_packing.words_to_f32(words) for words in scales)

    def unpack(self, k: PackedLanes, v: PackedLanes, scales: PackedLanes) -> PageVectors:
        zero_points, k_scales, v_scale = scales[:LANES], scales[LANES:-1], scales[-1]
        levels = zip(bit_packing.unpack_unsigned(k[0], 2), k_scales, zero_points, strict=True)
        keys = tuple(level * scale + zero_point for level, scale, zero_point in levels)
        return PageVectors(keys, tuple(level - 1.5 for level in bit_packing.unpack_unsigned(v[0], 2)), v_scale=v_scale)

    def rotation(self, head_dim: int) -> np.ndarray:
        return KV_FORMATS["int4"].rotation(head_dim)


def _quantize(
    lanes: PackedLanes, zero_points: list[jax.Array], scales: list[jax.Array]
) -> tuple[jax.Array, list[jax.Array]]:
    """The words of f32 lanes, and the bits of their scales: one a lane or one for all. Levels fit rounded scales."""
    scale_words = [bit_packing.bf16_to_words(jnp.maximum(scale, SMALLEST_SCALE)) for scale in scales]
    rounded = [bit_packing.words_to_f32(words) for words in scale_words] * (LANES // len(scales))
    levels = (
        bit_packing.nearest_codes((lane - zero_point) / scale, 0, 3)
        for lane, zero_point, scale in zip(lanes, zero_points, rounded, strict=True)
    )
    return bit_packing.pack_lanes(tuple(levels), 2), scale_words


def main(text: str) -> None:
    register_kv_format(Int2())
    model = load_model("smollm2-135m", "bf16")
    tokens = model.tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)
    for kv_precision in ("bf16", "int4", "int2"):
        engine = Engine(model, EngineConfig(kv_precision=kv_precision, max_batch_size=1, max_seq_len=512))
        print(measure_perplexity(engine, tokens, window=512, windows=2))


if __name__ == "__main__":
    main(sys.argv[1])
