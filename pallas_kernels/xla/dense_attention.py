"""The inner loop of attention: some queries over some keys, all at once."""

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import PageVectors
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention

EXACT = lax.Precision.HIGHEST


def attend(q: jax.Array, vectors: PageVectors, visible: jax.Array, soft_cap: float | None = None) -> PartialAttention:
    """Attention of queries to the keys and values of a batch's tokens.

    Args:
        q: f32[..., queries, head_dim], already multiplied by the softmax scale, in the vectors' basis.
        vectors: planes of f32[..., tokens, width], scales and offsets of f32[..., tokens, 1].
        visible: bool, broadcasts to [..., queries, tokens]; keys and scales of what is invisible may be NaN.
        soft_cap: see `AttentionSpec`.
    """
    # Queries before keys: for blocks of this size XLA's CPU products are faster so than the other way round.
    logits = sum(
        jnp.einsum("...qd,...td->...qt", part, plane, precision=EXACT)
        for plane, part in zip(vectors.k, jnp.split(q, len(vectors.k), axis=-1), strict=True)
    )
    if vectors.k_scale is not None:
        logits = logits * vectors.k_scale.swapaxes(-1, -2)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(visible, logits, NEGATIVE)
    peak = jnp.max(logits, axis=-1)
    weights = jnp.where(visible, jnp.exp(logits - peak[..., None]), 0.0)
    weight = weights.sum(axis=-1)
    scaled = weights if vectors.v_scale is None else weights * vectors.v_scale.swapaxes(-1, -2)
    parts = [jnp.einsum("...qt,...td->...qd", scaled, plane, precision=EXACT) for plane in vectors.v]
    total = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    if vectors.v_offset is not None:
        total = total + jnp.sum(weights * vectors.v_offset.swapaxes(-1, -2), axis=-1, keepdims=True)
    return PartialAttention(peak, weight, total)


def flatten_pages(vectors: PageVectors, counts: jax.Array) -> PageVectors:
    """Joins the axes of pages and of tokens, and clears the values of tokens that do not count: 0 * NaN is NaN.

    Args:
        vectors: of pages, planes f32[..., kv_heads, pages, T, width], scales and offsets [..., kv_heads, pages, T, 1].
        counts: bool[..., pages * T], whether a token counts.
    """
    counts = counts[..., None, :, None]

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    v = tuple(flat(plane) for plane in vectors.v)
    if vectors.v_scale is None:  # else they are finite for any words; their scales may be NaN
        v = tuple(jnp.where(counts, plane, 0.0) for plane in v)
    return PageVectors(
        k=tuple(flat(plane) for plane in vectors.k),
        v=v,
        k_scale=None if vectors.k_scale is None else flat(vectors.k_scale),
        v_scale=None if vectors.v_scale is None else jnp.where(counts, flat(vectors.v_scale), 0.0),
        v_offset=None if vectors.v_offset is None else jnp.where(counts, flat(vectors.v_offset), 0.0),
    )
