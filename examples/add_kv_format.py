"""Adds a KV format, 8-bit floating point, and compares it with those there are.

    python examples/add_kv_format.py TEXT_FILE

A format is a codec. Once it is registered, requests can name it: pools, scheduler, attention and command line take it
from the registry.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp

from fineserve_jax import Engine, EngineConfig
from fineserve_jax.loaders import load_model
from fineserve_jax.pallas_kernels.formats import PageVectors, PageWords, TokenFormat, register
from fineserve_jax.pallas_kernels.formats.packing import pack_planar, unpack_unsigned
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.perplexity import measure_perplexity

LARGEST = 448.0  # beyond it, e4m3 has only NaN


class Float8(TokenFormat):
    """Each number by itself, rounded to 4 bits of exponent and 3 of mantissa; no scales."""

    name = "fp8"
    value_bits = 8

    def encode(self, geometry: PageGeometry, k: jax.Array, v: jax.Array) -> PageWords:
        return PageWords(_to_words(k), _to_words(v), self.join_aux([], k))

    def unpack(self, geometry: PageGeometry, words: PageWords) -> PageVectors:
        return PageVectors(_to_planes(words.k), _to_planes(words.v))


def _to_words(values: jax.Array) -> jax.Array:
    small = jnp.clip(values, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
    return pack_planar(jax.lax.bitcast_convert_type(small, jnp.uint8), 8)


def _to_planes(words: jax.Array) -> tuple[jax.Array, ...]:
    planes = (plane.astype(jnp.uint8) for plane in unpack_unsigned(words, 8))
    return tuple(jax.lax.bitcast_convert_type(plane, jnp.float8_e4m3fn).astype(jnp.float32) for plane in planes)


def main(text: str) -> None:
    register(Float8())
    model = load_model("smollm2-135m", "bf16")
    tokens = model.tokenizer.encode(Path(text).read_text(encoding="utf-8"), add_special_tokens=False)
    for kv_precision in ("bf16", "int8", "fp8"):
        engine = Engine(model, EngineConfig(kv_precision=kv_precision, max_batch_size=1, max_seq_len=512))
        print(measure_perplexity(engine, tokens, window=512, windows=2))


if __name__ == "__main__":
    main(sys.argv[1])
