"""Paged attention of one query token per row."""

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers
from fineserve_jax.pallas_kernels.xla.tiles import Tiles

EXACT = lax.Precision.HIGHEST


def extend_over_pages(
    so_far: PartialAttention,
    q: jax.Array,
    arena: jax.Array,
    tiles: Tiles,
    layer: int | jax.Array,
    formats: tuple[KVFormat, ...],
    geometry: PageGeometry,
) -> PartialAttention:
    """Adds every row's cached tokens to its attention so far.

    Args:
        so_far: of f32[rows, kv_heads, group].
        q: f32[rows, kv_heads, group, head_dim], already multiplied by the softmax scale.
        arena: u16[num_units, unit_words].
        tiles: the rows' cached tokens; tiles of S segments by P pages.
        formats: what the tiles' format ids mean.
    """
    # One more row takes what the tiles' empty slots compute.
    padded = PartialAttention(*(jnp.pad(part, [(0, 1)] + [(0, 0)] * (part.ndim - 1)) for part in so_far))
    q = jnp.pad(q, [(0, 1), (0, 0), (0, 0), (0, 0)])

    for format_id, kv_format in enumerate(formats):

        def attend_tile(index: jax.Array, carry: PartialAttention, kv_format: KVFormat = kv_format) -> PartialAttention:
            rows = tiles.rows[index]
            words = gather_page_layers(arena, tiles.pages[index], layer, kv_format, geometry)
            part = _attend(q[rows], *kv_format.decode(geometry, words), tiles.num_tokens[index])
            part = part._replace(total=kv_format.restore(part.total))
            merged = PartialAttention(*(old[rows] for old in carry)).merge(part)
            return PartialAttention(*(old.at[rows].set(new) for old, new in zip(carry, merged, strict=True)))

        padded = lax.fori_loop(tiles.starts[format_id], tiles.starts[format_id + 1], attend_tile, padded)
    return PartialAttention(*(part[:-1] for part in padded))


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, num_tokens: jax.Array) -> PartialAttention:
    """q: f32[S, kv_heads, group, D]; k, v: f32[S, kv_heads, P, T, D], of which the first num_tokens[S] tokens count."""
    segments, kv_heads, pages, page_size, head_dim = k.shape
    k = k.reshape(segments, kv_heads, pages * page_size, head_dim)
    v = v.reshape(k.shape)
    counts = jnp.arange(pages * page_size) < num_tokens[:, None]
    # K first: XLA's CPU matrix products are several times faster in this order.
    logits = jnp.einsum("sktd,skgd->sktg", k, q, precision=EXACT)
    logits = jnp.where(counts[:, None, :, None], logits, NEGATIVE)
    peak = jnp.max(logits, axis=2)
    weights = jnp.where(counts[:, None, :, None], jnp.exp(logits - peak[:, :, None]), 0.0)
    # What lies behind the last token may be anything, NaN included, and 0 * NaN is NaN.
    v = jnp.where(counts[:, None, :, None], v, 0.0)
    total = jnp.einsum("skgt,sktd->skgd", weights.swapaxes(2, 3), v, precision=EXACT)
    return PartialAttention(peak, weights.sum(axis=2), total)
