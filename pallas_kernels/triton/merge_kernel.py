"""The second phase of attention in Triton: merging what a query's tiles added."""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store
from fineserve_jax.pallas_kernels.rotations import Rotations
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.triton.addressing import at, padded

HEADS = 8  # query heads that a program merges
VALUES = 8192  # of acc that it holds at a time

Ref = Any


class _Tables(NamedTuple):
    """Refs to what `Tiles` says of each query and query block; of each query block how many tiles it has; of each tile
    the rotation of its values."""

    query_block: Ref
    index_in_query_block: Ref
    counts: Ref
    query_block_tiles: Ref
    rotation_of_tile: Ref


def merge_tiles(spec: AttentionSpec, rotations: Rotations, parts: PartialAttention, tiles: Tiles) -> PartialAttention:
    """Merges the tiles of every query, in the order in which `query_block_tiles` lists them.

    Args:
        rotations: of the formats' values.
        parts: of f32[max_tiles, queries, heads]; only those of tiles in use are read.

    Returns:
        m and l, f32[num_queries, heads]; acc, f32[rotations, num_queries, heads, head_dim], each rotation with its
        formats' share.
    """
    max_tiles, _, heads, head_dim = parts.acc.shape
    num_queries = spec.query_axis_size
    rotation_of_tile = jnp.asarray(np.array([*rotations.of_codec, 0], np.int32))[tiles.format_ids]
    count = jnp.sum(tiles.query_block_tiles < max_tiles, axis=1, dtype=jnp.int32)
    per_program = min(HEADS, padded(heads, 1))
    shapes = ((num_queries, heads), (num_queries, heads), (len(rotations), num_queries, heads, head_dim))
    launch = pallas_call(
        functools.partial(_kernel, heads=per_program),
        grid=(num_queries, -(-heads // per_program), len(rotations)),
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
        compiler_params=triton_params(num_warps=4, num_stages=2),
        interpret=spec.interpret,
        name="merge_attention",
    )
    tables = (tiles.query_block, tiles.index_in_query_block, count, tiles.query_block_tiles, rotation_of_tile)
    return PartialAttention(*launch(parts, tables))


def _kernel(parts: PartialAttention, tables: tuple[Ref, ...], *outputs: Ref, heads: int) -> None:
    """One program: some heads of one query, in one rotation."""
    out, known = PartialAttention(*outputs), _Tables(*tables)
    query, rotation = program_id(0), program_id(2)
    num_query_blocks, tiles_per_query_block = known.query_block_tiles.shape
    num_heads, head_dim = parts.acc.shape[2:]
    columns = padded(head_dim)
    at_once = min(padded(tiles_per_query_block, 1), max(1, VALUES // (heads * columns)))

    block, index = load(known.query_block.at[query]), load(known.index_in_query_block.at[query])
    count = load(known.counts.at[block], mask=block < num_query_blocks, other=jnp.int32(0))
    head = program_id(1) * heads + lax.broadcasted_iota(jnp.int32, (1, heads, 1), 1)
    column = lax.broadcasted_iota(jnp.int32, (1, 1, columns), 2)
    inside = (head < num_heads) & (column < head_dim)
    reader = _PartReader(parts, known, at_once, block, index, count, rotation, head, column, inside)

    nothing = jnp.zeros((heads, 1), jnp.float32)
    start = PartialAttention(nothing + NEGATIVE, nothing, jnp.zeros((heads, columns), jnp.float32))
    merged = lax.fori_loop(0, lax.div(count + (at_once - 1), at_once), reader.add, start)

    head, column = head[0], column[0]
    first = (head < num_heads) & (rotation == 0)
    store(at(out.m, query, head), merged.m, mask=first)
    store(at(out.l, query, head), merged.l, mask=first)
    store(at(out.acc, rotation, query, head, column), merged.acc, mask=inside[0])


@dataclass(frozen=True)
class _PartReader:
    """Reads and merges the parts of one query's tiles, `at_once` at a time; arrays are [at_once, heads, columns]."""

    parts: PartialAttention
    tables: _Tables
    at_once: int
    block: jax.Array
    index: jax.Array
    count: jax.Array
    rotation: jax.Array
    head: jax.Array
    column: jax.Array
    inside: jax.Array

    def add(self, step: jax.Array, so_far: PartialAttention) -> PartialAttention:
        """Merges the parts of one step with what was merged so far, of f32[heads, 1 or columns]."""
        number = step * self.at_once + lax.broadcasted_iota(jnp.int32, (self.at_once, 1, 1), 0)
        listed = number < self.count
        tile = load(at(self.tables.query_block_tiles, self.block, number), mask=listed, other=jnp.int32(0))
        rotations = load(self.tables.rotation_of_tile.at[tile], mask=listed, other=jnp.int32(-1))
        mine = rotations == self.rotation
        known = listed & (self.head < self.parts.acc.shape[2])
        place = (tile, self.index, self.head)
        ms = load(at(self.parts.m, *place), mask=known, other=jnp.float32(NEGATIVE))
        ls = load(at(self.parts.l, *place), mask=known, other=jnp.float32(0))
        accs = load(at(self.parts.acc, *place, self.column), mask=mine & self.inside, other=jnp.float32(0))
        m = jnp.maximum(so_far.m, jnp.max(ms, axis=0))
        alpha, scale = jnp.exp(so_far.m - m), jnp.exp(ms - m[None])
        return PartialAttention(
            m, so_far.l * alpha + jnp.sum(ls * scale, axis=0), so_far.acc * alpha + jnp.sum(accs * scale, axis=0)
        )
