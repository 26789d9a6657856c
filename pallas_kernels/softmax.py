"""Attention in parts: partial softmax sums that merge (Milakov and Gimelshein, arXiv 1805.02867)."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # stands for minus infinity where exp(-inf - -inf) would give NaN


class PartialAttention(NamedTuple):
    """Attention of each query over some of its keys.

    Attributes:
        peak: f32[...], the largest logit; `NEGATIVE` if there was no key.
        weight: f32[...], the sum of exp(logit - peak); 0 if there was no key.
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

    def merge_rows(self, rows: jax.Array, parts: "PartialAttention") -> "PartialAttention":
        """Attention over the keys of both, where part p is of row `rows[p]`; a row may have several parts, or none.

        Args:
            rows: i32[P].
            parts: of f32[P, ...], this being of f32[rows, ...]. Costs nothing for rows that have no part.
        """
        peak = self.peak.at[rows].max(parts.peak)
        mine, theirs = jnp.exp(self.peak[rows] - peak[rows]), jnp.exp(parts.peak - peak[rows])
        # A row with several parts is scaled down once for all: it is set as often, to the same values.
        weight = self.weight.at[rows].set(self.weight[rows] * mine).at[rows].add(parts.weight * theirs)
        scaled = self.total.at[rows].set(self.total[rows] * mine[..., None])
        return PartialAttention(peak, weight, scaled.at[rows].add(parts.total * theirs[..., None]))

    def output(self) -> jax.Array:
        """f32[..., head_dim]: the attention output; 0 for queries that saw no key."""
        return self.total / jnp.where(self.weight > 0, self.weight, 1.0)[..., None]

    @property
    def log_sum_exp(self) -> jax.Array:
        """f32[...]: the logarithm of the softmax's denominator; minus infinity if there was no key."""
        return self.peak + jnp.log(self.weight)


def no_attention(shape: tuple[int, ...], head_dim: int) -> PartialAttention:
    """Attention to no key yet, of f32[*shape]."""
    zeros = jnp.zeros(shape, jnp.float32)
    return PartialAttention(zeros + NEGATIVE, zeros, jnp.zeros((*shape, head_dim), jnp.float32))
