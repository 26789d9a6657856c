"""What ways of keeping keys and values in about 3 bits cost, tried without packing a bit, for `docs/quality.md`.

    python benchmarks/narrow_schemes.py --text wikitext2_valid.txt

A forward pass over windows of a text, in which each token's own page is read in int8 and all earlier ones as the scheme
rounds them; compared with the same pass in float32. Ranges of keys are by channel over a page, those of values by
token, both of rotated vectors. Quicker to change than a format, and able to do what no format does: keep the first
page, in which attention sinks are, in int8. Prints a line for each scheme, and then all as one of JSON.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from fineserve_jax.engine.estimates import draws_of, estimate
from fineserve_jax.engine.perplexity import read_text
from fineserve_jax.loaders import load_model
from fineserve_jax.models import CausalLM, Params
from fineserve_jax.models.registry import build_model
from fineserve_jax.pallas_kernels.formats.int4 import hadamard
from fineserve_jax.runner.comparison import Differences

Round = Callable[[jax.Array], jax.Array]  # f32[heads, pages, T, D], rotated -> the same, rounded
LEAST = 1e-20
TILE = 256  # positions whose logits are there at a time
GAUSS = {2: (-1.5104, -0.4528, 0.4528, 1.5104), 3: (-2.1519, -1.3439, -0.756, -0.2451, 0.2451, 0.756, 1.3439, 2.1519)}
"""Levels of least squared error for normal numbers (Max, 1960)."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    text: Path
    model: str = "smollm2-135m"
    window: int = 1024
    windows: int = 4
    output: Path | None = None
    """Where to write the JSON, too: docs/quality/schemes-3-bits.json."""


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How keys and values are rounded; None: not at all."""

    name: str
    keys: Round | None = None
    values: Round | None = None
    page_size: int = 16
    sink: bool = False  # the first page stays in int8


def int8(x: jax.Array) -> jax.Array:
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True) / 127, LEAST)
    return jnp.round(x / scale) * scale


def evenly(bits: int, *, shrink: float = 1.0) -> Round:
    """By token, from the smallest to the largest value, or `shrink` of that range around its middle."""

    def rounded(x: jax.Array) -> jax.Array:
        low, high = jnp.min(x, axis=-1, keepdims=True), jnp.max(x, axis=-1, keepdims=True)
        middle, reach = (low + high) / 2, (high - low) / 2 * shrink
        step = jnp.maximum(2 * reach / (2**bits - 1), LEAST)
        return jnp.clip(jnp.round((x - middle + reach) / step), 0, 2**bits - 1) * step + middle - reach

    return rounded


def normal_levels(bits: int) -> Round:
    """By token, levels for normal numbers, whose scale is fitted to those it is for."""

    def rounded(x: jax.Array) -> jax.Array:
        scale = jnp.maximum(jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True)), LEAST)
        near = _nearest(x / scale, bits)
        fitted = jnp.sum(x * near, axis=-1, keepdims=True) / jnp.sum(near * near, axis=-1, keepdims=True)
        scale = jnp.maximum(fitted, LEAST)
        return _nearest(x / scale, bits) * scale

    return rounded


def _nearest(x: jax.Array, bits: int) -> jax.Array:
    levels = np.array(GAUSS[bits], np.float32)
    return jnp.asarray(levels)[jnp.sum(x[..., None] > (levels[1:] + levels[:-1]) / 2, axis=-1)]


def by_channel(bits: int, *, middle_bits: int = 8, scale_bits: int = 8, shared: int = 1, fit: bool = False) -> Round:
    """By channel: ranges around middles that are multiples of a unit, which the page and head share.

    Args:
        scale_bits: of each range's length, spaced evenly in its logarithm over 4 octaves; 8: exact.
        shared: channels that share a length.
        fit: take the length, out of 1, 0.85 and 0.7 times what reaches all, that gives the least squared error.
    """
    codes = 2**bits - 1

    def rounded(x: jax.Array) -> jax.Array:
        low, high = jnp.min(x, axis=-2, keepdims=True), jnp.max(x, axis=-2, keepdims=True)
        middle = (low + high) / 2
        unit = jnp.maximum(jnp.max(jnp.abs(middle), axis=-1, keepdims=True) / (2 ** (middle_bits - 1) - 1), LEAST)
        middle = jnp.round(middle / unit) * unit
        reach = jnp.maximum(jnp.maximum(high - middle, middle - low), LEAST)
        best, least = x, jnp.full_like(reach, jnp.inf)
        for factor in (1.0, 0.85, 0.7) if fit else (1.0,):
            step = 2 * _kept(reach * factor, scale_bits, shared) / codes
            found = (jnp.clip(jnp.round((x - middle) / step + codes / 2), 0, codes) - codes / 2) * step + middle
            error = jnp.sum((found - x) ** 2, axis=-2, keepdims=True)
            best, least = jnp.where(error < least, found, best), jnp.minimum(error, least)
        return best

    return rounded


def _kept(reach: jax.Array, scale_bits: int, shared: int) -> jax.Array:
    if shared > 1:
        groups = reach.reshape(*reach.shape[:-1], shared, -1)
        reach = jnp.broadcast_to(jnp.max(groups, axis=-2, keepdims=True), groups.shape).reshape(reach.shape)
    if scale_bits == 8:
        return reach
    longest, most = jnp.max(reach, axis=-1, keepdims=True), 2**scale_bits - 1
    place = jnp.clip(jnp.floor(jnp.log2(longest / reach) / 4 * most), 0, most)
    return longest * 2.0 ** (-place * 4 / most)


K3, V3 = by_channel(3), evenly(3)
SCHEMES = (
    Scheme("int4's ranges, 4 and 4 bits", by_channel(4), evenly(4)),
    Scheme("K 4", by_channel(4)),
    Scheme("K 4, ranges in 4 + 4 bits", by_channel(4, middle_bits=4, scale_bits=4)),
    Scheme("K 3", K3),
    Scheme("K 3, ranges in 4 + 4 bits", by_channel(3, middle_bits=4, scale_bits=4)),
    Scheme("K 3, ranges in 6 + 4 bits", by_channel(3, middle_bits=6, scale_bits=4)),
    Scheme("K 3, four channels share a length", by_channel(3, shared=4)),
    Scheme("K 3, least squared error", by_channel(3, fit=True)),
    Scheme("K 3, least squared error, first page in int8", by_channel(3, fit=True), sink=True),
    Scheme("V 2, levels for normal numbers", values=normal_levels(2)),
    Scheme("V 2", values=evenly(2)),
    Scheme("V 3, levels for normal numbers", values=normal_levels(3)),
    Scheme("V 3", values=V3),
    Scheme("V 3, 0.9 of the range", values=evenly(3, shrink=0.9)),
    Scheme("K 3, V 3, ranges in 4 + 4 bits", by_channel(3, middle_bits=4, scale_bits=4), V3),
    Scheme("K 3, V 3 (int3)", K3, V3),
    Scheme("K 3, V 3 (int3), pages of 32 tokens", K3, V3, page_size=32),
    Scheme("K 3, V 3 (int3), first page in int8", K3, V3, sink=True),
)


def attend(scheme: Scheme, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Causal attention f32[N, heads, D], earlier pages rounded and the own one in int8."""
    count, kv_heads, head_dim = k.shape
    pages = (kv_heads, count // scheme.page_size, scheme.page_size, head_dim)
    page = jnp.arange(count) // scheme.page_size
    own, causal = page[:, None] == page, jnp.arange(count)[:, None] >= jnp.arange(count)

    def both(x: jax.Array, rounding: Round | None) -> tuple[jax.Array, jax.Array]:
        x = x.swapaxes(0, 1)
        if rounding is None:
            return x, x
        matrix = hadamard(head_dim)
        rounded, near = (rounding((x @ matrix).reshape(pages)).reshape(x.shape) @ matrix.T), int8(x)
        return (rounded.at[:, : scheme.page_size].set(near[:, : scheme.page_size]) if scheme.sink else rounded), near

    (far_k, near_k), (far_v, near_v) = both(k, scheme.keys), both(v, scheme.values)
    grouped = q.reshape(count, kv_heads, -1, head_dim).transpose(1, 2, 0, 3) / math.sqrt(head_dim)
    far, near = (jnp.einsum("hgqd,htd->hgqt", grouped, part) for part in (far_k, near_k))
    weights = jax.nn.softmax(jnp.where(causal, jnp.where(own, near, far), -jnp.inf), axis=-1)
    mixed = jnp.einsum("hgqt,htd->hgqd", jnp.where(own, 0, weights), far_v)
    mixed += jnp.einsum("hgqt,htd->hgqd", jnp.where(own, weights, 0), near_v)
    return mixed.transpose(2, 0, 1, 3).reshape(q.shape)


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    loaded = load_model(arguments.model, "fp32")
    model, params = build_model(loaded.config, "fp32"), loaded.params
    text = read_text(arguments.text, arguments.window, arguments.windows)
    tokens = np.array(loaded.tokenizer.encode(text, add_special_tokens=False), np.int32)
    size = arguments.window
    windows = [tokens[i * size : (i + 1) * size] for i in range(arguments.windows)]

    positions = jnp.arange(size, dtype=jnp.int32)

    def hidden(scheme: Scheme) -> list[np.ndarray]:
        """What the last layer gives, normalised, window by window."""

        @jax.jit
        def run(params: Params, tokens: jax.Array) -> jax.Array:
            return model.apply({"params": params}, tokens, positions, functools.partial(attend, scheme))

        return [np.asarray(run(params, window)) for window in windows]

    differences = jax.jit(functools.partial(compare, model))
    exact, rows = hidden(Scheme("fp32")), []
    for scheme in SCHEMES:
        pairs = zip(exact, hidden(scheme), windows, strict=True)
        found = [differences_of(functools.partial(differences, params), *pair) for pair in pairs]
        rows.append({"scheme": scheme.name, "page_size": scheme.page_size, **summary(found)})
        print(rows[-1], flush=True)
    flags = f"--text {arguments.text.name} --window {size} --windows {arguments.windows}"
    command = f"python benchmarks/narrow_schemes.py {flags}"
    told = {"command": command, "window": size, "windows": arguments.windows, "schemes": rows}
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(told))


def differences_of(
    compared: Callable[..., Differences], before: np.ndarray, after: np.ndarray, tokens: np.ndarray
) -> Differences:
    """Of the positions of a window whose successors are known, a tile of them at a time."""
    parts = [slice(start, min(start + TILE, len(tokens) - 1)) for start in range(0, len(tokens) - 1, TILE)]
    tiles = [jax.device_get(compared(before[own], after[own], tokens[1:][own])) for own in parts]
    return Differences(*(np.concatenate(column, axis=-1) for column in zip(*tiles, strict=True)))


def compare(model: CausalLM, params: Params, first: jax.Array, second: jax.Array, targets: jax.Array) -> Differences:
    """One program for each number of positions; what the last layer gave is normalised already."""
    before, after = (
        jax.nn.log_softmax(model.apply({"params": params}, hidden, method="logits"), axis=-1)
        for hidden in (first, second)
    )
    of_targets = [jnp.take_along_axis(part, targets[:, None], axis=-1)[:, 0] for part in (before, after)]
    same = jnp.argmax(before, axis=-1) == jnp.argmax(after, axis=-1)
    return Differences(jnp.sum(jnp.exp(before) * (before - after), axis=-1), same, jnp.stack(of_targets))


def summary(found: Sequence[Differences]) -> dict[str, dict[str, float]]:
    """Rise of perplexity, KL divergence and share of equal likeliest tokens, with intervals over windows."""
    draws = draws_of(len(found))

    def rise(own: Sequence[Differences]) -> float:
        return math.expm1(float(np.mean([window.logprobs[0] - window.logprobs[1] for window in own])))

    figures = {
        "rise": estimate(draws, rise, found),
        "kl": estimate(draws, lambda own: float(np.mean([window.kl for window in own])), found),
        "same_top": estimate(draws, lambda own: float(np.mean([window.same_top for window in own])), found),
    }
    return {name: figure._asdict() for name, figure in figures.items()}


if __name__ == "__main__":
    main()
