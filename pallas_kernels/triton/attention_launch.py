"""Paged attention in Triton: one launch for segments of all formats, and a second one that merges.

A program attends from one query block, all query heads of one KV head, to one tile: up to P pages of one segment
(`attention_kernel`). Tiles of a query block are merged by a second launch (`merge_kernel`), as in flash-decoding: long
rows occupy many cores, and sums have a fixed order.
"""

import functools

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.pallas_api import pallas_call, triton_params
from fineserve_jax.pallas_kernels.rotations import Rotations
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.triton.addressing import padded
from fineserve_jax.pallas_kernels.triton.attention_kernel import LEAST, LaunchShape, Tables, attention_kernel
from fineserve_jax.pallas_kernels.triton.merge_kernel import merge_tiles
from fineserve_jax.pallas_kernels.triton.tiling import TILING

# Chosen by what ptxas makes of them for sm_90a and sm_80: no spills and, decoding at head size 128, 128 registers a
# thread at most. With three stages both page ids and pages are on their way while a chunk is multiplied; where products
# take longer than loads, or padding takes registers, two are enough.
MAX_ROWS = 32  # queries x query heads that a program attends from
CHUNK_VALUES, MAX_TOKENS = 32 * 128, 32  # of keys, and as many of values, that a program multiplies at a time
DECODE_STAGES, STAGES = 3, 2


def launch_shape(spec: AttentionSpec, group: int, dtype: jnp.dtype) -> LaunchShape:
    """How a launch for `group` query heads a KV head, with products at `dtype`, is cut."""
    geometry, queries = spec.geometry, TILING.shape(spec).queries
    columns = padded(geometry.head_dim)
    # Masks of padded vectors take registers, and so do operands in f32.
    plain = columns == geometry.head_dim and dtype != jnp.float32
    chunk = max(LEAST, min(MAX_TOKENS, CHUNK_VALUES // columns)) if plain else LEAST
    rows = min(MAX_ROWS, padded(queries * group)) if plain and columns > 64 else LEAST
    tokens = min(chunk, geometry.page_size)
    warps = 8 if columns > 128 else 4 if columns > 64 else 2
    stages = DECODE_STAGES if queries == 1 and plain else STAGES
    return LaunchShape(queries, group, rows, chunk // tokens, tokens, warps, stages)


def attend_pages(
    spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """Attention of each query to its row's cached tokens: see `Backend.attend`. Tiles are of one segment each."""
    num_queries, kv_heads, group, head_dim = q.shape
    rotations = Rotations(spec.formats, head_dim)
    parts = _attend_tiles(spec, rotations, rotations.rotate(q), arena, tiles, layer)
    merged = merge_tiles(spec, rotations, parts, tiles)
    acc = functools.reduce(jnp.add, (rotations.unrotate(merged.acc[i], i) for i in range(len(rotations))))
    heads = (num_queries, kv_heads, group)
    return PartialAttention(merged.m.reshape(heads), merged.l.reshape(heads), acc.reshape(q.shape))


def _attend_tiles(
    spec: AttentionSpec, rotations: Rotations, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """What each tile adds: of f32[max_tiles, queries, heads], unwritten where there is no tile or no query."""
    _, _, kv_heads, group, head_dim = q.shape
    shape = launch_shape(spec, group, q.dtype)
    max_tiles = TILING.shape(spec).max_tiles
    rows = (max_tiles, shape.queries, kv_heads * group)
    tables = Tables(
        tiles.segment_slots[:, 0],
        tiles.pages[:, 0],
        tiles.num_tokens[:, 0],
        tiles.positions[:, 0],
        tiles.format_ids,
        tiles.query_starts,
        tiles.query_counts,
        tiles.query_positions,
        layer,
    )
    launch = pallas_call(
        functools.partial(attention_kernel, spec=spec, rotations=rotations, shape=shape),
        grid=(max_tiles, kv_heads, shape.row_blocks),
        out_shape=[jax.ShapeDtypeStruct(dims, jnp.float32) for dims in (rows, rows, (*rows, head_dim))],
        compiler_params=triton_params(num_warps=shape.warps, num_stages=shape.stages),
        interpret=spec.interpret,
        name="paged_attention",
    )
    return PartialAttention(*launch(q, arena, tables))
