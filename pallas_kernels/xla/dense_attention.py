"""The inner loop of attention: some queries over some keys, all at once."""

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import PageVectors, UnpackedVectors
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention

EXACT = lax.Precision.HIGHEST


def attend(q: jax.Array, vectors: PageVectors, visible: jax.Array, soft_cap: float | None = None) -> PartialAttention:
    """Attention of queries to the keys and values of a batch's tokens.

    Args:
        q: f32[..., queries, head_dim], already multiplied by the softmax scale, rotated as the vectors are.
        vectors: packed lanes of f32[..., tokens, width], scales and zero points of f32[..., tokens, 1].
        visible: bool, broadcasts to [..., queries, tokens]; keys and scales of what is invisible may be NaN.
        soft_cap: see `AttentionSpec`.
    """
    # Queries before keys: for blocks of this size XLA's CPU products are faster so than the other way round.
    logits = sum(
        jnp.einsum("...qd,...td->...qt", part, lane, precision=EXACT)
        for lane, part in zip(vectors.k.lanes, jnp.split(q, len(vectors.k.lanes), axis=-1), strict=True)
    )
    if vectors.k.scale is not None:
        logits = logits * vectors.k.scale.swapaxes(-1, -2)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    logits = jnp.where(visible, logits, NEGATIVE)
    m = jnp.max(logits, axis=-1)
    weights = jnp.where(visible, jnp.exp(logits - m[..., None]), 0.0)
    l = weights.sum(axis=-1)
    scaled = weights if vectors.v.scale is None else weights * vectors.v.scale.swapaxes(-1, -2)
    parts = [jnp.einsum("...qt,...td->...qd", scaled, lane, precision=EXACT) for lane in vectors.v.lanes]
    acc = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
    if vectors.v.zero_point is not None:
        acc = acc + jnp.sum(weights * vectors.v.zero_point.swapaxes(-1, -2), axis=-1, keepdims=True)
    return PartialAttention(m, l, acc)


def flatten_pages(vectors: PageVectors, counts: jax.Array) -> PageVectors:
    """Joins the axes of pages and of tokens, and clears the values of tokens that do not count: 0 * NaN is NaN.

    Args:
        vectors: of pages, packed lanes f32[..., kv_heads, pages, T, width], scales and zero points
            f32[..., kv_heads, pages, T, 1].
        counts: bool[..., pages * T], whether a token counts.
    """
    counts = counts[..., None, :, None]

    def flat(x: jax.Array) -> jax.Array:
        return x.reshape(*x.shape[:-3], -1, x.shape[-1])

    def cleared(x: jax.Array | None) -> jax.Array | None:
        return None if x is None else jnp.where(counts, flat(x), 0.0)

    k, v = vectors
    values = tuple(flat(lane) for lane in v.lanes)
    if v.scale is None:  # else they are finite for any words; their scales may be NaN
        values = tuple(jnp.where(counts, lane, 0.0) for lane in values)
    return PageVectors(
        UnpackedVectors(tuple(flat(lane) for lane in k.lanes), None if k.scale is None else flat(k.scale)),
        UnpackedVectors(values, cleared(v.scale), cleared(v.zero_point)),
    )
