"""The Mosaic kernel: a grid step attends from one query block to one tile, in whatever format that is kept.

Pages come by asynchronous copies of a layer of a page each, a few pages to a step, into three buffers by turns: a grid
step first orders its successor's first pages into one of them; the pages of its own steps take turns in the other two,
those of the next step arriving while one is computed. A query block's tiles follow one another, and its softmax sums
stay in vector memory meanwhile.
"""

import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import PageLayout
from fineserve_jax.pallas_kernels.mosaic_tpu.launch_plan import Launch, Memory, Outputs, Ref, TileTable
from fineserve_jax.pallas_kernels.mosaic_tpu.page_copies import TileCopies
from fineserve_jax.pallas_kernels.mosaic_tpu.tile_attention import TileAttention
from fineserve_jax.pallas_kernels.pallas_api import program_id, when
from fineserve_jax.pallas_kernels.softmax import NEGATIVE


def attention_kernel(
    launch: Launch, table: TileTable, page_table: Ref, layer: Ref, q: Ref, rotations: Ref, arena: Ref, *refs: Ref
) -> None:
    """A grid step. `q` is [1, query_rows, head_dim], `rotations` f32[rotations, head_dim, head_dim]."""
    out, memory = Outputs(*refs[:2]), Memory(*refs[2:])
    tiles = TileCopies(launch, table, page_table, layer[0], arena, memory)
    tile = program_id(0)

    @when(tile == 0)
    def _() -> None:
        tiles.start_tile(tile)

    tiles.start_tile(tile + 1)

    @when(lax.rem(tile, launch.tiles_per_query_block) == 0)
    def _() -> None:
        memory.m[...] = jnp.full(memory.m.shape, NEGATIVE, jnp.float32)
        memory.l[...] = jnp.zeros(memory.l.shape, jnp.float32)
        out.acc[...] = jnp.zeros(out.acc.shape, jnp.float32)
        lane = lax.broadcasted_iota(jnp.int32, out.stats.shape, 2)
        out.stats[...] = jnp.where(lane == 0, NEGATIVE, 0.0)

    for number, layout in enumerate(launch.formats):

        @when((table.format_ids[tile] == number) & (tiles.num_steps(tile) > 0))
        def _(number: int = number, layout: PageLayout = layout) -> None:
            TileAttention(tiles, number, layout, tile, q, rotations, out).run()
