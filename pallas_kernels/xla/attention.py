"""Paged attention as XLA loops over a batch's tiles, format by format."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.softmax import PartialAttention, no_attention
from fineserve_jax.pallas_kernels.spec import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.xla.attend import attend, flatten_pages
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers, settled

AttendTile = Callable[..., PartialAttention]
AddTile = Callable[[jax.Array, KVFormat, jax.Array, PartialAttention], PartialAttention]


def attend_pages(
    spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """Attention of each query to its row's cached tokens.

    Args:
        q: f32 or bf16[num_queries, kv_heads, group, head_dim], already multiplied by the softmax scale. Products are
            taken in f32 either way.
        arena, tiles, layer: see `paged_attention`.

    Returns:
        of f32[num_queries, kv_heads, group].
    """
    attend_to = _decode if spec.tile_shape.queries == 1 else _ragged
    return attend_to(spec, q.astype(jnp.float32), functools.partial(_attend_tile, spec, arena, tiles, layer), tiles)


def _decode(spec: AttentionSpec, q: jax.Array, attend_tile: AttendTile, tiles: Tiles) -> PartialAttention:
    """One query a row: tiles of pieces of many rows' segments, whose sums are kept row by row."""
    num_rows, *heads, head_dim = q.shape

    def add_tile(q: jax.Array, kv_format: KVFormat, index: jax.Array, so_far: PartialAttention) -> PartialAttention:
        rows = tiles.slots[index] // spec.segments_per_row
        own = jnp.minimum(rows, num_rows - 1)
        part = attend_tile(index, q[own], tiles.query_positions[own][:, None], kv_format)
        return so_far.merge_rows(rows, part)

    # One more row takes what the tiles' empty places compute.
    seen = _fold(spec, no_attention((num_rows + 1, *heads), head_dim), add_tile, q, tiles)
    return PartialAttention(*(part[:-1] for part in seen))


def _ragged(spec: AttentionSpec, q: jax.Array, attend_tile: AttendTile, tiles: Tiles) -> PartialAttention:
    """Blocks of queries: tiles of one segment, whose sums are kept query by query."""
    shape = spec.tile_shape
    num_queries, kv_heads, group, head_dim = q.shape

    def add_tile(q: jax.Array, kv_format: KVFormat, index: jax.Array, so_far: PartialAttention) -> PartialAttention:
        block = tiles.slots[index, 0] // shape.segments_per_row
        first, place = tiles.query_slots[block], jnp.arange(shape.queries)

        def of_block(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, first, shape.queries, axis=1)

        own = of_block(q).reshape(1, kv_heads, shape.queries * group, head_dim)
        # Slots behind the block's queries belong to others; at position -1 they see nothing.
        positions = jnp.where(place < tiles.query_counts[block], tiles.query_positions[block] + place, -1)
        part = attend_tile(index, own, jnp.repeat(positions, group)[None], kv_format)
        part = PartialAttention(*(x.reshape(kv_heads, shape.queries, group, *x.shape[3:]) for x in part))
        merged = PartialAttention(*(of_block(old) for old in so_far)).merge(part)
        return PartialAttention(
            *(lax.dynamic_update_slice_in_dim(old, new, first, 1) for old, new in zip(so_far, merged, strict=True))
        )

    # Heads first, as products want them; padded, so that no block's slice is moved back into the one before.
    padded = jnp.pad(q.swapaxes(0, 1), [(0, 0), (0, shape.queries), (0, 0), (0, 0)])
    seen = _fold(spec, no_attention(padded.shape[:-1], head_dim), add_tile, padded, tiles)
    return PartialAttention(*(part[:, :num_queries].swapaxes(0, 1) for part in seen))


def _fold(
    spec: AttentionSpec, so_far: PartialAttention, add_tile: AddTile, q: jax.Array, tiles: Tiles
) -> PartialAttention:
    """Takes the attention so far through every tile, format by format. `q` is in the model's basis."""
    for format_id, kv_format in enumerate(spec.formats):
        add = functools.partial(add_tile, kv_format.to_basis(q), kv_format)
        so_far = lax.fori_loop(tiles.starts[format_id], tiles.starts[format_id + 1], add, so_far)
    return so_far


def _attend_tile(
    spec: AttentionSpec,
    arena: jax.Array,
    tiles: Tiles,
    layer: jax.Array,
    index: jax.Array,
    q: jax.Array,
    query_positions: jax.Array,
    kv_format: KVFormat,
) -> PartialAttention:
    """Attention of each segment's queries to a tile of its tokens, in the model's basis.

    Args:
        q: f32[S, kv_heads, queries, head_dim], in the format's basis.
        query_positions: i32[S, queries].
    """
    place = jnp.arange(tiles.pages.shape[-1] * spec.geometry.page_size)
    counts = place < tiles.num_tokens[index][:, None]
    ahead = query_positions[:, :, None] - (tiles.positions[index][:, None] + place)[:, None, :]
    visible = counts[:, None, :] & (ahead >= 0)
    if spec.window is not None:
        visible &= ahead < spec.window
    words = gather_page_layers(arena, tiles.pages[index], layer, kv_format, spec.geometry)
    vectors = kv_format.unpack(words.k, words.v, settled(*kv_format.read_aux(words.aux)))
    part = attend(q, flatten_pages(vectors, counts), visible[:, None], spec.soft_cap)
    return part._replace(total=kv_format.from_basis(part.total))
