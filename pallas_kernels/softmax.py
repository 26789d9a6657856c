"""Attention in parts: partial softmax sums that merge (Milakov and Gimelshein, arXiv 1805.02867).

Names are those of flash attention (Dao et al., arXiv 2205.14135): m, l and acc.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

NEGATIVE = -1e30  # stands for minus infinity where exp(-inf - -inf) would give NaN


class PartialAttention(NamedTuple):
    """Attention of each query over some of its keys.

    Attributes:
        m: f32[...], the largest logit; `NEGATIVE` if there was no key.
        l: f32[...], the sum of exp(logit - m); 0 if there was no key.
        acc: f32[..., head_dim], the sum of exp(logit - m) * value.
    """

    m: jax.Array
    l: jax.Array
    acc: jax.Array

    def merge(self, other: "PartialAttention") -> "PartialAttention":
        """Attention over the keys of both."""
        m = jnp.maximum(self.m, other.m)
        mine, theirs = jnp.exp(self.m - m), jnp.exp(other.m - m)
        return PartialAttention(
            m,
            self.l * mine + other.l * theirs,
            self.acc * mine[..., None] + other.acc * theirs[..., None],
        )

    def merge_rows(self, rows: jax.Array, parts: "PartialAttention") -> "PartialAttention":
        """Attention over the keys of both, where part p is of row `rows[p]`; a row may have several parts, or none.

        Args:
            rows: i32[P].
            parts: of f32[P, ...], this being of f32[rows, ...]. Costs nothing for rows that have no part.
        """
        m = self.m.at[rows].max(parts.m)
        mine, theirs = jnp.exp(self.m[rows] - m[rows]), jnp.exp(parts.m - m[rows])
        # A row with several parts is scaled down once for all: it is set as often, to the same values.
        l = self.l.at[rows].set(self.l[rows] * mine).at[rows].add(parts.l * theirs)
        scaled = self.acc.at[rows].set(self.acc[rows] * mine[..., None])
        return PartialAttention(m, l, scaled.at[rows].add(parts.acc * theirs[..., None]))

    def output(self) -> jax.Array:
        """f32[..., head_dim]: the attention output; 0 for queries that saw no key."""
        return self.acc / jnp.where(self.l > 0, self.l, 1.0)[..., None]

    @property
    def log_sum_exp(self) -> jax.Array:
        """f32[...]: the logarithm of the softmax's denominator; minus infinity if there was no key."""
        return self.m + jnp.log(self.l)


def no_attention(shape: tuple[int, ...], head_dim: int) -> PartialAttention:
    """Attention to no key yet, of f32[*shape]."""
    zeros = jnp.zeros(shape, jnp.float32)
    return PartialAttention(zeros + NEGATIVE, zeros, jnp.zeros((*shape, head_dim), jnp.float32))
