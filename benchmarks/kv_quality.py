"""What ways of keeping keys and values in 4 bits cost, for `docs/quality.md`.

    python benchmarks/kv_quality.py --text wikitext2_valid.txt

Each scheme is a KV format like any other, so it is measured through the engine's own cache: a token sees its own page
in int8 and all earlier pages quantised. The simulated schemes keep their dequantised numbers in 32-bit words, which
changes nothing about what is read; their bits are those that a packed page would take, scales counted, padding not.
"""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import tyro

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.perplexity import read_text
from fineserve_jax.engine.quality import WIDE, measure_quality
from fineserve_jax.entrypoints.cli.quality import print_quality
from fineserve_jax.loaders import load_model
from fineserve_jax.pallas_kernels import PageGeometry
from fineserve_jax.pallas_kernels.formats import EncodedVectors, KVFormat, PackedLanes, get_format, register
from fineserve_jax.pallas_kernels.formats.wide import Float32Codec

Quantise = Callable[[jax.Array], jax.Array]  # f32[..., T, D] -> the same, rounded to what 4 bits keep


@dataclasses.dataclass(frozen=True)
class Arguments:
    text: Path
    model: str = "smollm2-135m"
    weights: str = "fp32"
    window: int = 1024
    windows: int = 8
    output: Path | None = None
    """Where to write the JSON, too: docs/quality/schemes-4-bits.json."""


class Rounded(Float32Codec):
    """A page-wise codec, given as what it makes of vectors."""

    residual = "int8"

    def __init__(self, name: str, quantise: Quantise) -> None:
        self.name, self._quantise = name, quantise

    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        return super().encode((self._quantise(*lanes),))


class Simulated(KVFormat):
    """A scheme, given as what it makes of keys and of values."""

    def __init__(self, name: str, bits: float, k: Quantise, v: Quantise) -> None:
        super().__init__(Rounded(f"{name}, keys", k), Rounded(f"{name}, values", v), name)
        self._bits = bits

    def bits_per_value(self, geometry: PageGeometry) -> float:
        """Those of a packed page, padding not counted."""
        return self._bits


def symmetric(x: jax.Array) -> jax.Array:
    """One scale per token and head."""
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 7, 1e-30)
    return jnp.clip(jnp.round(x / scale), -7, 7) * scale


def asymmetric(x: jax.Array, axis: int = -1) -> jax.Array:
    """Scale and minimum per token and head, or with axis -2 per channel and page."""
    low, high = jnp.min(x, axis=axis, keepdims=True), jnp.max(x, axis=axis, keepdims=True)
    step = jnp.maximum((high - low) / 15, 1e-30)
    return jnp.clip(jnp.round((x - low) / step), 0, 15) * step + low


def in_groups(x: jax.Array, size: int = 32) -> jax.Array:
    return asymmetric(x.reshape(*x.shape[:-1], -1, size)).reshape(x.shape)


def by_channel(x: jax.Array) -> jax.Array:
    return asymmetric(x, axis=-2)


def rotated(quantise: Quantise) -> Quantise:
    """The same of vectors that are rotated as the project's int4 does."""
    int4 = get_format("int4").key
    return lambda x: int4.unrotate(quantise(int4.rotate(x)))


SCHEMES = [
    Simulated("symmetric per token", 4.25, symmetric, symmetric),
    Simulated("asymmetric per token", 4.5, asymmetric, asymmetric),
    Simulated("asymmetric, groups of 32", 5.0, in_groups, in_groups),
    Simulated("rotated symmetric per token", 4.25, rotated(symmetric), rotated(symmetric)),
    Simulated("rotated asymmetric per token", 4.5, rotated(asymmetric), rotated(asymmetric)),
    Simulated("K by channel, V rotated, 16-bit ranges", 5.25, by_channel, rotated(asymmetric)),
    Simulated("K rotated by channel, V rotated, 16-bit ranges", 5.25, rotated(by_channel), rotated(asymmetric)),
]


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    model = load_model(arguments.model, arguments.weights)
    text = read_text(arguments.text, arguments.window, arguments.windows)
    names = [register(scheme).name for scheme in SCHEMES]
    config = EngineConfig(
        kv_precision=WIDE,
        kv_formats=(WIDE, "int4", *names),
        max_batch_size=len(names) + 2,
        max_seq_len=arguments.window,
    )
    found = measure_quality(
        Engine(model, config),
        model.tokenizer.encode(text, add_special_tokens=False),
        ["int4", *names],
        arguments.window,
        arguments.windows,
        new_tokens=1,
        on_window=lambda done: print(f"window {done} of {arguments.windows}", file=sys.stderr, flush=True),
    )
    print_quality(found, max_loss=1.0)
    flags = f"--text {arguments.text.name} --window {arguments.window} --windows {arguments.windows}"
    told = {"command": f"python benchmarks/kv_quality.py {flags}", **found.as_dict()}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))


if __name__ == "__main__":
    main()
