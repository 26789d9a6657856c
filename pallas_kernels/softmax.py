"""Attention in parts: partial softmax sums that merge (Milakov and Gimelshein, arXiv 1805.02867)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # stands for minus infinity where exp(-inf - -inf) would give NaN


class PartialAttention(NamedTuple):
    """Attention of each query over some of its keys.

    Attributes:
        peak: f32[...], the largest logit.
        weight: f32[...], the sum of exp(logit - peak); the log-sum-exp is peak + log(weight).
        total: f32[..., head_dim], the sum of exp(logit - peak) * value.
    """

    peak: jax.Array
    weight: jax.Array
    total: jax.Array

    def merge(self, other: "PartialAttention") -> "PartialAttention":
        """Attention over the keys of both."""
        peak = jnp.maximum(self.peak, other.peak)
        mine, theirs = jnp.exp(self.peak - peak), jnp.exp(other.peak - peak)
        return PartialAttention(
            peak,
            self.weight * mine + other.weight * theirs,
            self.total * mine[..., None] + other.total * theirs[..., None],
        )

    def output(self) -> jax.Array:
        """f32[..., head_dim]: the attention output. Every query must have seen at least one key."""
        return self.total / self.weight[..., None]
