"""Rotary position embedding, half-rotation layout: of d rotated values, value i turns together with value i + d / 2."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32

from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.rope_scaling import RopeScaling


def rope_frequencies(config: ModelConfig, long: bool = False) -> tuple[np.ndarray, float]:
    """Radians per position of each pair, f32[rotated / 2], and the factor applied to cos and sin.

    long: of sequences longer than the original context, where that makes a difference (longrope).
    """
    exponents = np.arange(0, config.rotated, 2, dtype=np.float64) / config.rotated
    base = config.rope_theta**-exponents
    scaling = config.rope_scaling
    attention_factor = 1.0
    if scaling is None:
        freqs = base
    elif scaling.kind == "linear":
        freqs = base / scaling.factor
    elif scaling.kind == "factors":
        freqs = base / np.asarray(scaling.factors, np.float64)
    elif scaling.kind == "longrope":
        freqs = base / np.asarray(scaling.long_factors if long else scaling.factors, np.float64)
        attention_factor = longrope_attention_factor(scaling)
    elif scaling.kind == "llama3":
        freqs = _llama3(base, scaling)
    else:
        freqs = _yarn(base, config.rope_theta, config.rotated, scaling)
        stated = scaling.attention_factor
        attention_factor = yarn_attention_factor(scaling.factor) if stated is None else stated
    return freqs.astype(np.float32), attention_factor


RopeTables = tuple[Float32[jax.Array, "N 1 half_dim"], Float32[jax.Array, "N 1 half_dim"]]


def rope_tables(
    config: ModelConfig, positions: Int32[jax.Array, " N"], long: Bool[jax.Array, " N"] | None = None
) -> RopeTables:
    """cos and sin, each f32[N, 1, rotated / 2], for positions i32[N].

    long: whether each token's sequence is longer than the original context (longrope); None: none is.
    """
    freqs, factor = rope_frequencies(config)
    chosen: jax.Array | np.ndarray = freqs
    if long is not None and config.long_after is not None:
        chosen = jnp.where(long[:, None, None], rope_frequencies(config, long=True)[0], freqs)
    angles = positions.astype(jnp.float32)[:, None, None] * chosen
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def apply_rope(
    x: Float32[jax.Array, "N heads head_dim"],
    cos: Float32[jax.Array, "N 1 half_dim"],
    sin: Float32[jax.Array, "N 1 half_dim"],
) -> Float32[jax.Array, "N heads head_dim"]:
    """Rotate heads f32[N, heads, head_dim] by the tables of `rope_tables`; values past those they turn stay."""
    half = cos.shape[-1]
    first, second, rest = jnp.split(x, (half, 2 * half), axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def _llama3(base: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Frequencies slower than the low band are stretched, faster than the high band kept, blended between."""
    turns = scaling.original_max_position * base / (2 * math.pi)
    band = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / band, 0.0, 1.0)
    return base * keep + base / scaling.factor * (1.0 - keep)


def _yarn(base: np.ndarray, theta: float, rotated: int, scaling: RopeScaling) -> np.ndarray:
    """arXiv 2309.00071, eq. 17 to 23: a linear ramp over dimensions between interpolation and none."""

    def dimension_of(turns: float) -> float:
        return rotated * math.log(scaling.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotated - 1)
    ramp = np.clip((np.arange(rotated // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    return base * (1.0 - ramp) + base / scaling.factor * ramp


def yarn_attention_factor(factor: float) -> float:
    """arXiv 2309.00071, eq. 22: what cos and sin are multiplied by unless the checkpoint says."""
    return 0.1 * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def longrope_attention_factor(scaling: RopeScaling) -> float:
    """arXiv 2402.13753, section 3.3, as Phi-3 has it: what cos and sin are multiplied by unless the checkpoint says."""
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.factor <= 1.0:
        return 1.0
    return math.sqrt(1.0 + math.log(scaling.factor) / math.log(scaling.original_max_position))
