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
from fineserve_jax.pallas_kernels.triton.attention_kernel import attention_kernel
from fineserve_jax.pallas_kernels.triton.launch_shape import Tables, launch_shape
from fineserve_jax.pallas_kernels.triton.merge_kernel import merge_tiles
from fineserve_jax.pallas_kernels.triton.tiling import TILING


def attend_pages(
    spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """Attention of each query to its row's cached tokens: see `Backend.attend`. Tiles are of one segment each."""
    num_queries, kv_heads, group, head_dim = q.shape
    of_keys, of_values = (Rotations(codecs, head_dim) for codecs in zip(*(f.sides for f in spec.formats), strict=True))
    parts = _attend_tiles(spec, of_keys, of_keys.rotate(q), arena, tiles, layer)
    merged = merge_tiles(spec, of_values, parts, tiles)
    acc = functools.reduce(jnp.add, (of_values.unrotate(merged.acc[i], i) for i in range(len(of_values))))
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
