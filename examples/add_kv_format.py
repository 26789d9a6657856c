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
    Aux,
    Engine,
    EngineConfig,
    KVFormat,
    PageVectors,
    PageWords,
    Planes,
    load_model,
    measure_perplexity,
    packing,
    register_kv_format,
)

PLANES = 8  # values that share a 16-bit word
SMALLEST_STEP = 2.0**-100


class Int2(KVFormat):
    """Four levels a value; vectors rotated as in int4, which makes their channels nearly normal.

    Keys: levels from the smallest to the largest number of each channel in a page. Values: step * (-1.5, -0.5, 0.5,
    1.5), one step a token. The best step for normal numbers is their standard deviation (Max, 1960), and the largest of
    64 to 128 of them is about 2.5 of these.
    """

    name = "int2"
    value_bits = 2
    aux = (*[Aux.CHANNEL] * 2 * PLANES, Aux.TOKEN)  # of the planes of K lowest levels, then steps; the steps of V
    residual = "bf16"  # channels' ranges take a whole page; until it is full, its tokens are kept so

    def encode(self, k: Planes, v: Planes) -> PageWords:
        low_words = [packing.bf16_to_words(jnp.min(plane, axis=-2, keepdims=True)) for plane in k]
        lows = [packing.words_to_f32(words) for words in low_words]
        ranges = [jnp.max(plane, axis=-2, keepdims=True) - low for plane, low in zip(k, lows, strict=True)]
        k_words, k_steps = _quantise(k, lows, [extent / 3 for extent in ranges])
        step = packing.largest(tuple(jnp.abs(plane) for plane in v)) / 2.5
        v_words, v_steps = _quantise(v, [-1.5 * step] * PLANES, [step])
        return PageWords((k_words,), (v_words,), (*low_words, *k_steps, *v_steps))

    def read_aux(self, aux: Planes) -> Planes:
        return tuple(packing.words_to_f32(words) for words in aux)

    def unpack(self, k: Planes, v: Planes, numbers: Planes) -> PageVectors:
        lows, steps, v_step = numbers[:PLANES], numbers[PLANES:-1], numbers[-1]
        planes = zip(packing.unpack_unsigned(k[0], 2), steps, lows, strict=True)
        keys = tuple(level * step + low for level, step, low in planes)
        return PageVectors(keys, tuple(level - 1.5 for level in packing.unpack_unsigned(v[0], 2)), v_scale=v_step)

    def rotation(self, head_dim: int) -> np.ndarray:
        return KV_FORMATS["int4"].rotation(head_dim)


def _quantise(planes: Planes, lows: list[jax.Array], steps: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """The words of f32 planes, and the bits of their steps: one a plane or one for all. Levels fit rounded steps."""
    step_words = [packing.bf16_to_words(jnp.maximum(step, SMALLEST_STEP)) for step in steps]
    rounded = [packing.words_to_f32(words) for words in step_words] * (PLANES // len(steps))
    levels = (
        packing.nearest_codes((plane - low) / step, 0, 3)
        for plane, low, step in zip(planes, lows, rounded, strict=True)
    )
    return packing.pack_planar(tuple(levels), 2), step_words


def main(text: str) -> None:
    register_kv_format(Int2())
    model = load_model("smollm2-135m", "bf16")
    tokens = model.tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)
    for kv_precision in ("bf16", "int4", "int2"):
        engine = Engine(model, EngineConfig(kv_precision=kv_precision, max_batch_size=1, max_seq_len=512))
        print(measure_perplexity(engine, tokens, window=512, windows=2))


if __name__ == "__main__":
    main(sys.argv[1])
