"""Attention of prefill chunks: among a step's own tokens, and over their cached tokens.

A step's chunks lie side by side on one token axis of C slots, each starting at a multiple of the page size, so that a
slot's page is `slot // page_size`. Queries are kept heads first, f32[kv_heads, C, group, head_dim].
"""

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers
from fineserve_jax.pallas_kernels.xla.tiles import Tiles

EXACT = lax.Precision.HIGHEST


def attend_within(
    q: jax.Array,
    own_page: tuple[jax.Array, jax.Array],
    earlier_pages: tuple[jax.Array, jax.Array],
    chunk_of_page: jax.Array,
) -> PartialAttention:
    """Causal attention of each chunk's tokens to themselves.

    A token sees the keys and values of its own page as they are kept until the page is full, and those of earlier
    pages as they are kept from then on: just what decoding token by token would read.

    Args:
        q: f32[kv_heads, C, group, head_dim], already multiplied by the softmax scale.
        own_page: k and v, f32[kv_heads, pages, T, head_dim].
        earlier_pages: k and v, the same shape.
        chunk_of_page: i32[pages], the chunk that each page of slots belongs to; any two unused pages may share -1.
    """
    kv_heads, pages, page_size, _ = own_page[0].shape
    own = _attend_pages(q, *own_page)
    if pages == 1:
        return own
    same_chunk = chunk_of_page[:, None] == chunk_of_page
    earlier = jnp.arange(pages)[:, None] < jnp.arange(pages)
    visible = jnp.repeat(jnp.repeat(same_chunk & earlier, page_size, axis=0), page_size, axis=1)
    k, v = (part.reshape(kv_heads, pages * page_size, -1) for part in earlier_pages)
    return own.merge(_attend(q, k, v, visible[:, :, None]))


def extend_over_pages(
    so_far: PartialAttention,
    q: jax.Array,
    chunk_of_slot: jax.Array,
    arena: jax.Array,
    tiles: Tiles,
    layer: int | jax.Array,
    formats: tuple[KVFormat, ...],
    geometry: PageGeometry,
) -> PartialAttention:
    """Adds every chunk's cached tokens to its attention so far.

    Args:
        so_far: of f32[kv_heads, C, group].
        q: f32[kv_heads, C, group, head_dim], already multiplied by the softmax scale.
        chunk_of_slot: i32[C].
        tiles: the chunks' cached tokens; tiles of one segment by P pages, whose rows are chunks.
        arena, layer, formats, geometry: as for `decode.extend_over_pages`.
    """
    for format_id, kv_format in enumerate(formats):

        def attend_tile(index: jax.Array, carry: PartialAttention, kv_format: KVFormat = kv_format) -> PartialAttention:
            words = gather_page_layers(arena, tiles.pages[index, 0], layer, kv_format, geometry)
            k, v = (
                part.reshape(geometry.kv_heads, -1, geometry.head_dim) for part in kv_format.decode(geometry, words)
            )
            counts = jnp.arange(k.shape[1]) < tiles.num_tokens[index, 0]
            v = jnp.where(counts[:, None], v, 0.0)  # what lies behind the last token may be NaN
            visible = counts[:, None, None] & (chunk_of_slot == tiles.rows[index, 0])[:, None]
            part = _attend(q, k, v, visible)
            return carry.merge(part._replace(total=kv_format.restore(part.total)))

        so_far = lax.fori_loop(tiles.starts[format_id], tiles.starts[format_id + 1], attend_tile, so_far)
    return so_far


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> PartialAttention:
    """q: f32[kv_heads, C, group, D]; k, v: f32[kv_heads, keys, D]; visible: bool, broadcasts to [keys, C, group]."""
    logits = jnp.einsum("ktd,kcgd->ktcg", k, q, precision=EXACT)
    logits = jnp.where(visible, logits, NEGATIVE)
    peak = jnp.max(logits, axis=1)
    weights = jnp.where(visible, jnp.exp(logits - peak[:, None]), 0.0)
    total = jnp.einsum("ktcg,ktd->kcgd", weights, v, precision=EXACT)
    return PartialAttention(peak, weights.sum(axis=1), total)


def _attend_pages(q: jax.Array, k: jax.Array, v: jax.Array) -> PartialAttention:
    """Causal attention inside each page. q: f32[kv_heads, C, group, D]; k, v: f32[kv_heads, pages, T, D]."""
    kv_heads, pages, page_size, head_dim = k.shape
    paged = q.reshape(kv_heads, pages, page_size, -1, head_dim)
    logits = jnp.einsum("kptd,kpcgd->kptcg", k, paged, precision=EXACT)
    causal = (jnp.arange(page_size)[:, None] <= jnp.arange(page_size))[:, :, None]
    logits = jnp.where(causal, logits, NEGATIVE)
    peak = jnp.max(logits, axis=2)
    weights = jnp.exp(logits - peak[:, :, None])
    total = jnp.einsum("kptcg,kptd->kpcgd", weights, v, precision=EXACT)
    parts = PartialAttention(peak, weights.sum(axis=2), total)
    return PartialAttention(*(part.reshape(kv_heads, pages * page_size, *part.shape[3:]) for part in parts))
