"""What is static of a launch of the Mosaic attention kernel, and the tables and memory that its grid steps use."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import PageLayout
from fineserve_jax.pallas_kernels.mosaic_tpu.page_unpacker import buffer_tiles

Ref = Any
ROW_MULTIPLE = 16  # rows of a bf16 tile
BUFFERS = 3  # two for the steps of a tile by turns, one for the first pages of the next tile


@dataclass(frozen=True)
class Launch:
    """What is static of a launch.

    Attributes:
        formats: how each format's pages lie.
        rotations: of each format, the numbers of the rotations its keys and its values are kept in; None: none.
        tiles_per_query_block: grid steps of each query block.
        group: query heads of a KV head.
        queries: query tokens of a query block.
        query_rows: rows of a query block, `(kv head, group, query)`, padded.
        dtype: of queries and products.
        window, soft_cap: see `AttentionSpec`.
    """

    formats: tuple[PageLayout, ...]
    rotations: tuple[tuple[int | None, int | None], ...]
    tiles_per_query_block: int
    group: int
    queries: int
    query_rows: int
    dtype: jnp.dtype
    window: int | None
    soft_cap: float | None

    @property
    def pages(self) -> int:
        """Pages of a step."""
        return self.formats[0].pages

    @property
    def page_tiles(self) -> int:
        return max(buffer_tiles(layout) for layout in self.formats)

    @property
    def spare_rows(self) -> int:
        """Rows that have to be picked apart by phase."""
        sides = [side for layout in self.formats for side in layout.sides]
        return max([side.groups * side.period for side in sides if side.period > 1], default=8)

    @property
    def arranged_rows(self) -> int:
        """Rows of queries arranged as keys lie in their rows."""
        keys = [layout.keys for layout in self.formats]
        return max(layout.num_packed_lanes * layout.sharing for layout in keys) * self.query_rows

    @property
    def max_packed_lanes(self) -> int:
        """Of values."""
        return max(layout.values.num_packed_lanes for layout in self.formats)

    @property
    def precision(self) -> lax.Precision:
        return lax.Precision.HIGHEST if self.dtype == jnp.float32 else lax.Precision.DEFAULT

    def dot(self, a: jax.Array, b: jax.Array, *, transposed: bool = False) -> jax.Array:
        """a @ b, or a @ b.T, at the precision of the queries; sums in f32."""
        return dot(a.astype(self.dtype), b.astype(self.dtype), self.precision, transposed=transposed)


class TileTable(NamedTuple):
    """Of each grid step, i32[steps + 1]; behind the last there is one that has no tile.

    Attributes:
        format_ids: `len(formats)` if there is no tile.
        first_pages: where in the page table begin the pages that some query sees.
        num_pages: how many these are.
        tokens_before: tokens of the tile before these pages.
        num_tokens: tokens of the tile, up to the last one that some query sees.
        offsets: position of the query block's first query less that of the tile's first token.
        query_blocks: whose queries attend.
        outputs: where a query block's result goes.
    """

    format_ids: Any
    first_pages: Any
    num_pages: Any
    tokens_before: Any
    num_tokens: Any
    offsets: Any
    query_blocks: Any
    outputs: Any


class Memory(NamedTuple):
    """What outlives a grid step, or is too large for registers.

    Attributes:
        pages: u16[BUFFERS, pages, page_tiles, 8, 128]; semaphores: one for each buffer.
        spare: i32[spare_rows, 128].
        arranged: dtype[arranged_rows, 128], the queries, for each head block, packed lane and vector of a group.
        m, l: f32[query_rows, 128], a query block's, equal in all lanes.
        acc: f32[max_packed_lanes, query_rows, 128], a tile's, in the lanes in which values lie in their rows.
    """

    pages: Ref
    semaphores: Ref
    spare: Ref
    arranged: Ref
    m: Ref
    l: Ref
    acc: Ref


class Outputs(NamedTuple):
    """A query block's sums over its tiles so far.

    Attributes:
        acc: f32[1, query_rows, head_dim], rotated back.
        stats: f32[1, query_rows, 128]: lane 0 is m, lane 1 is l.
    """

    acc: Ref
    stats: Ref


def dot(a: jax.Array, b: jax.Array, precision: lax.Precision, *, transposed: bool = False) -> jax.Array:
    """a @ b, or a @ b.T, summed in f32."""
    dimensions = (((1,), (1 if transposed else 0,)), ((), ()))
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=jnp.float32)
