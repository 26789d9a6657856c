"""Paged attention as XLA loops over a batch's tiles, format by format."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.softmax import PartialAttention, no_attention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.tiling import TileSizes, Tiling
from fineserve_jax.pallas_kernels.xla.dense_attention import attend, flatten_pages
from fineserve_jax.pallas_kernels.xla.page_gather import gather_page_layers, settled

# On a CPU a tile's keys and values should stay in a core's cache.
TILING = Tiling(
    decode=TileSizes(splits=16, queries=1, tokens=64),
    ragged=TileSizes(splits=1, queries=128, tokens=256),
)

AttendTile = Callable[..., PartialAttention]
AddTile = Callable[[jax.Array, KVFormat, jax.Array, PartialAttention], PartialAttention]


def attend_pages(
    spec: AttentionSpec,
    q: jax.Array,
    arena: jax.Array,
    tiles: Tiles,
    layer: jax.Array,
    format_ids: Sequence[int] | None = None,
) -> PartialAttention:
    """Attention of each query to its row's cached tokens: see `Backend.attend`. Products are taken in f32.

    With `format_ids` only to those in these formats.
    """
    attend_to = _decode if TILING.shape(spec).queries == 1 else _ragged
    attend_tile = functools.partial(_attend_tile, spec, arena, tiles, layer)
    ids = range(len(spec.formats)) if format_ids is None else format_ids
    return attend_to(spec, q.astype(jnp.float32), attend_tile, tiles, ids)


def _decode(
    spec: AttentionSpec, q: jax.Array, attend_tile: AttendTile, tiles: Tiles, format_ids: Sequence[int]
) -> PartialAttention:
    """One query a row: tiles of KV splits of many rows' segments, whose sums are kept row by row."""
    num_rows, *heads, head_dim = q.shape

    def add_tile(q: jax.Array, kv_format: KVFormat, index: jax.Array, so_far: PartialAttention) -> PartialAttention:
        rows = tiles.segment_slots[index] // spec.segments_per_row
        own = jnp.minimum(rows, num_rows - 1)
        part = attend_tile(index, q[own], tiles.query_positions[own][:, None], kv_format)
        return so_far.merge_rows(rows, part)

    # One more row takes what the tiles' empty places compute.
    seen = _fold(spec, no_attention((num_rows + 1, *heads), head_dim), add_tile, q, tiles, format_ids)
    return PartialAttention(*(part[:-1] for part in seen))


def _ragged(
    spec: AttentionSpec, q: jax.Array, attend_tile: AttendTile, tiles: Tiles, format_ids: Sequence[int]
) -> PartialAttention:
    """Query blocks: tiles of one segment, whose sums are kept query by query."""
    shape = TILING.shape(spec)
    num_queries, kv_heads, group, head_dim = q.shape

    def add_tile(q: jax.Array, kv_format: KVFormat, index: jax.Array, so_far: PartialAttention) -> PartialAttention:
        block = tiles.segment_slots[index, 0] // shape.segments_per_row
        first, index_in_block = tiles.query_starts[block], jnp.arange(shape.queries)

        def of_block(x: jax.Array) -> jax.Array:
            return lax.dynamic_slice_in_dim(x, first, shape.queries, axis=1)

        own = of_block(q).reshape(1, kv_heads, shape.queries * group, head_dim)
        # Slots behind the block's queries belong to others; at position -1 they see nothing.
        positions = jnp.where(
            index_in_block < tiles.query_counts[block], tiles.query_positions[block] + index_in_block, -1
        )
        part = attend_tile(index, own, jnp.repeat(positions, group)[None], kv_format)
        part = PartialAttention(*(x.reshape(kv_heads, shape.queries, group, *x.shape[3:]) for x in part))
        merged = PartialAttention(*(of_block(old) for old in so_far)).merge(part)
        return PartialAttention(
            *(lax.dynamic_update_slice_in_dim(old, new, first, 1) for old, new in zip(so_far, merged, strict=True))
        )

    # Heads first, as products want them; padded, so that no block's slice is moved back into the one before.
    padded = jnp.pad(q.swapaxes(0, 1), [(0, 0), (0, shape.queries), (0, 0), (0, 0)])
    seen = _fold(spec, no_attention(padded.shape[:-1], head_dim), add_tile, padded, tiles, format_ids)
    return PartialAttention(*(part[:, :num_queries].swapaxes(0, 1) for part in seen))


def _fold(
    spec: AttentionSpec,
    so_far: PartialAttention,
    add_tile: AddTile,
    q: jax.Array,
    tiles: Tiles,
    format_ids: Sequence[int],
) -> PartialAttention:
    """Takes the attention so far through every tile, format by format. `q` is the model's, not rotated."""
    for format_id in format_ids:
        kv_format = spec.formats[format_id]
        add = functools.partial(add_tile, kv_format.key.rotate(q), kv_format)
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
    """Attention of each segment's queries to a tile of its tokens, values rotated back.

    Args:
        q: f32[S, kv_heads, queries, head_dim], rotated as the format keeps its keys.
        query_positions: i32[S, queries].
    """
    token = jnp.arange(tiles.pages.shape[-1] * spec.geometry.page_size)
    counts = token < tiles.num_tokens[index][:, None]
    ahead = query_positions[:, :, None] - (tiles.positions[index][:, None] + token)[:, None, :]
    visible = counts[:, None, :] & (ahead >= 0)
    if spec.window is not None:
        visible &= ahead < spec.window
    words = gather_page_layers(arena, tiles.pages[index], layer, kv_format, spec.geometry)
    of_keys, of_values = (codec.read_scales(side.scales) for codec, side in zip(kv_format.sides, words, strict=True))
    vectors = kv_format.unpack(words, settled((of_keys, of_values)))
    part = attend(q, flatten_pages(vectors, counts), visible[:, None], spec.soft_cap)
    return part._replace(acc=kv_format.value.unrotate(part.acc))
