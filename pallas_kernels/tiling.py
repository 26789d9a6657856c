"""How a backend cuts batches into tiles."""

from dataclasses import dataclass

from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import TileShape


@dataclass(frozen=True)
class TileSizes:
    """`TileShape.splits`, `TileShape.queries`, and at most this many tokens of a KV split."""

    splits: int
    queries: int
    tokens: int


@dataclass(frozen=True)
class Tiling:
    """The tile sizes of a backend: for decoding, and for batches whose rows have any number of queries."""

    decode: TileSizes
    ragged: TileSizes

    def shape(self, spec: AttentionSpec) -> TileShape:
        """The static shape of the tiles of a batch."""
        sizes = self.decode if spec.decodes else self.ragged
        return TileShape(
            num_rows=spec.num_rows,
            num_queries=spec.query_axis_size,
            max_pages=spec.max_pages,
            num_formats=len(spec.formats),
            segments_per_row=spec.segments_per_row,
            splits=min(sizes.splits, spec.num_rows) if spec.packs else 1,
            pages=max(1, min(sizes.tokens // spec.geometry.page_size, spec.max_pages)),
            queries=min(sizes.queries, 1 << (spec.query_axis_size - 1).bit_length()),
        )
