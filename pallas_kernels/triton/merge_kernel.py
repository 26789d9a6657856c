"""The second phase of attention in Triton: merging what a query's tiles added."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store
from fineserve_jax.pallas_kernels.rotations import Bases
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.triton.addressing import at, padded

HEADS = 8  # query heads that a program merges
VALUES = 8192  # of totals that it holds at a time

Ref = Any


def merge_tiles(spec: AttentionSpec, bases: Bases, parts: PartialAttention, tiles: Tiles) -> PartialAttention:
    """Merges the tiles of every query, in the order in which `block_tiles` lists them.

    Args:
        parts: of f32[max_tiles, queries, heads]; only those of tiles in use are read.

    Returns:
        peak and weight, f32[num_queries, heads]; total, f32[bases, num_queries, heads, head_dim], each basis with its
        formats' share.
    """
    max_tiles, _, heads, head_dim = parts.total.shape
    num_queries = spec.num_query_slots
    basis_of_tile = jnp.asarray(np.array([*bases.index, 0], np.int32))[tiles.format_ids]
    count = jnp.sum(tiles.block_tiles < max_tiles, axis=1, dtype=jnp.int32)
    per_program = min(HEADS, padded(heads, 1))
    shapes = ((num_queries, heads), (num_queries, heads), (len(bases), num_queries, heads, head_dim))
    launch = pallas_call(
        functools.partial(_kernel, heads=per_program),
        grid=(num_queries, -(-heads // per_program), len(bases)),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=spec.interpret,
        name="merge_attention",
    )
    tables = (tiles.block_of_query, tiles.place_in_block, count, tiles.block_tiles, basis_of_tile)
    return PartialAttention(*launch(parts, tables))


def _kernel(parts: PartialAttention, tables: tuple[Ref, ...], *outputs: Ref, heads: int) -> None:
    out = PartialAttention(*outputs)
    block_of_query, place_in_block, counts, block_tiles, basis_of_tile = tables
    query, basis = program_id(0), program_id(2)
    num_blocks, tiles_per_block = block_tiles.shape
    num_heads, head_dim = parts.total.shape[2:]
    lanes = padded(head_dim)
    at_once = min(padded(tiles_per_block, 1), max(1, VALUES // (heads * lanes)))

    block, place = load(block_of_query.at[query]), load(place_in_block.at[query])
    count = load(counts.at[block], mask=block < num_blocks, other=jnp.int32(0))
    head = program_id(1) * heads + lax.broadcasted_iota(jnp.int32, (1, heads, 1), 1)
    lane = lax.broadcasted_iota(jnp.int32, (1, 1, lanes), 2)
    inside = (head < num_heads) & (lane < head_dim)

    def add(step: jax.Array, so_far: PartialAttention) -> PartialAttention:
        index = step * at_once + lax.broadcasted_iota(jnp.int32, (at_once, 1, 1), 0)
        tile = load(at(block_tiles, block, index), mask=index < count, other=jnp.int32(0))
        mine = load(basis_of_tile.at[tile], mask=index < count, other=jnp.int32(-1)) == basis
        known = (index < count) & (head < num_heads)
        peaks = load(at(parts.peak, tile, place, head), mask=known, other=jnp.float32(NEGATIVE))
        weights = load(at(parts.weight, tile, place, head), mask=known, other=jnp.float32(0))
        totals = load(at(parts.total, tile, place, head, lane), mask=mine & inside, other=jnp.float32(0))
        peak = jnp.maximum(so_far.peak, jnp.max(peaks, axis=0))
        fade, scale = jnp.exp(so_far.peak - peak), jnp.exp(peaks - peak[None])
        return PartialAttention(
            peak,
            so_far.weight * fade + jnp.sum(weights * scale, axis=0),
            so_far.total * fade + jnp.sum(totals * scale, axis=0),
        )

    nothing = jnp.zeros((heads, 1), jnp.float32)
    start = PartialAttention(nothing + NEGATIVE, nothing, jnp.zeros((heads, lanes), jnp.float32))
    merged = lax.fori_loop(0, lax.div(count + (at_once - 1), at_once), add, start)

    head, lane = head[0], lane[0]
    first = (head < num_heads) & (basis == 0)
    store(at(out.peak, query, head), merged.peak, mask=first)
    store(at(out.weight, query, head), merged.weight, mask=first)
    store(at(out.total, basis, query, head, lane), merged.total, mask=inside[0])
