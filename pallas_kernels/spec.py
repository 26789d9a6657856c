"""What is static of an attention, and how each implementation cuts a batch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import (
    Implementation,
    check_implementation,
    default_implementation,
    is_interpreted,
)
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, Tiles, TileShape, plan_tiles


@dataclass(frozen=True)
class TileChoice:
    """How an implementation cuts a batch: `TileShape.rows`, `.queries`, and at most this many tokens of a segment."""

    rows: int
    queries: int
    tokens: int


# XLA on a CPU: a tile's keys and values should stay in a core's cache. Triton: a tile is a program's work; splits of
# 512 tokens give a long row to many cores at once. Mosaic: one core takes a segment whole.
DECODE_TILES: dict[Implementation, TileChoice] = {
    "xla": TileChoice(rows=16, queries=1, tokens=64),
    "triton": TileChoice(rows=1, queries=1, tokens=512),
    "mosaic_tpu": TileChoice(rows=1, queries=1, tokens=1 << 30),
}
RAGGED_TILES: dict[Implementation, TileChoice] = {
    "xla": TileChoice(rows=1, queries=128, tokens=256),
    "triton": TileChoice(rows=1, queries=32, tokens=4096),
    "mosaic_tpu": TileChoice(rows=1, queries=32, tokens=1 << 30),
}


@dataclass(frozen=True)
class AttentionSpec:
    """All that is static of an attention: a program is compiled for each.

    Attributes:
        geometry: of the pages.
        formats: what the segments' format ids mean.
        num_rows: rows of the batch.
        max_pages: pages of the longest segment there can be.
        num_queries: slots of the query axis; None: one a row, slot r for row r (decoding).
        segments_per_row: most segments a row has.
        window: a query sees keys less than this many positions back; None: all before it.
        soft_cap: logits are capped to soft_cap * tanh(logit / soft_cap); None: not.
        implementation: xla, triton or mosaic_tpu.
        interpret: run Pallas kernels in Python and XLA, on any platform.
    """

    geometry: PageGeometry
    formats: tuple[KVFormat, ...]
    num_rows: int
    max_pages: int
    num_queries: int | None = None
    segments_per_row: int = 1
    window: int | None = None
    soft_cap: float | None = None
    implementation: Implementation = field(default_factory=default_implementation)
    interpret: bool | None = None

    def __post_init__(self) -> None:
        check_implementation(self.implementation)
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} hides every key; use at least 1, or None for no window")
        if self.soft_cap is not None and not (math.isfinite(self.soft_cap) and self.soft_cap > 0):
            raise ValueError(f"soft_cap={self.soft_cap} is no positive number; use None for no cap")
        if self.interpret is None:
            object.__setattr__(self, "interpret", is_interpreted(self.implementation))

    @property
    def decodes(self) -> bool:
        """Whether every row has one query."""
        return self.num_queries is None

    @property
    def tile_shape(self) -> TileShape:
        choice = (DECODE_TILES if self.decodes else RAGGED_TILES)[self.implementation]
        pages = max(1, min(choice.tokens // self.geometry.page_size, self.max_pages))
        num_queries = self.num_rows if self.num_queries is None else self.num_queries
        return TileShape(
            num_rows=self.num_rows,
            num_queries=num_queries,
            max_pages=self.max_pages,
            num_formats=len(self.formats),
            segments_per_row=self.segments_per_row,
            rows=min(choice.rows, self.num_rows),
            pages=pages,
            queries=min(choice.queries, 1 << (num_queries - 1).bit_length()),
        )

    def plan(self, segments: Sequence[BatchSegment], queries: Sequence[QueryRun]) -> Tiles:
        """Cuts a batch for `paged_attention`; numpy, on the host.

        Args:
            segments: the rows' cached tokens, in any order. A row's must not overlap.
            queries: of each row; decoding, row r has slot r.

        Raises:
            ValueError: more segments or longer ones than the spec provides for.
        """
        return plan_tiles(segments, queries, self.tile_shape, self.geometry.page_size)
