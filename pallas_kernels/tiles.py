"""Cutting a batch's segments into tiles of one size, on the host.

A segment is cut into KV splits of up to `pages` pages. A tile is what one pass of an attention loop, or one program of
an attention kernel, reads: up to `splits` KV splits of one format, for a query block of up to `queries` query tokens.
Splits fill one tile after the other, whichever segments they are of, so that little of a tile is padding. How many
tiles there are is data, not shape: one compiled program serves any mix of formats and lengths. A row with more queries
than a query block holds takes several blocks, each with tiles of its own.

Every query block has `segments_per_row` segment slots, one for each segment that its queries attend to.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

Array = jax.Array | np.ndarray


@dataclass(frozen=True, slots=True)
class BatchSegment:
    """A run of a row's cached tokens in one format: the unit of work of every attention kernel.

    Attributes:
        row: which row of the batch it belongs to.
        format_id: index into the program's formats.
        pages: first units of its pages, in order.
        num_tokens: how many tokens of those pages count.
        first_position: position of the first of them in the row's sequence.
    """

    row: int
    format_id: int
    pages: Sequence[int]
    num_tokens: int
    first_position: int = 0


@dataclass(frozen=True, slots=True)
class QueryRun:
    """A row's query tokens: adjacent on the query axis, at adjacent positions.

    Attributes:
        start: index of the first on the query axis.
        num_queries: how many.
        first_position: position of the first of them in the row's sequence.
    """

    start: int
    num_queries: int
    first_position: int


class Tiles(NamedTuple):
    """A batch's cached tokens as equal tiles; numpy on the host, the same on the device.

    A tile of S KV splits by P pages.

    Attributes:
        segment_slots: i32[max_tiles, S], of the split's segment; `num_segment_slots` (one past the last) where there is
            no split.
        pages: i32[max_tiles, S, P]; 0, the null page, where there is none.
        num_tokens: i32[max_tiles, S], the tokens of the split's pages that count.
        positions: i32[max_tiles, S], position of the first of them.
        format_ids: i32[max_tiles]; `num_formats` where there is no tile.
        starts: i32[formats + 1]: the tiles of format f are `starts[f]` to `starts[f + 1]`.
        query_block_tiles: i32[num_query_blocks, tiles_per_query_block], the tiles that each query block has a part in,
            in order; `max_tiles` behind them.
        query_starts, query_counts, query_positions: i32[num_query_blocks], of each query block its first index on the
            query axis, the number of queries (0: no such block) and the position of the first.
        query_block, index_in_query_block: i32[num_queries], where each index of the query axis belongs;
            `num_query_blocks` and 0 for those without a query.
    """

    segment_slots: Array
    pages: Array
    num_tokens: Array
    positions: Array
    format_ids: Array
    starts: Array
    query_block_tiles: Array
    query_starts: Array
    query_counts: Array
    query_positions: Array
    query_block: Array
    index_in_query_block: Array


@dataclass(frozen=True)
class TileShape:
    """The static shape of a batch's tiles.

    Attributes:
        num_rows: rows of the batch.
        num_queries: length of the query axis.
        max_pages: pages of the longest segment there can be.
        num_formats: formats of the program.
        segments_per_row: most segments a row has.
        splits, pages: KV splits that a tile holds, and pages of a split.
        queries: query tokens a query block holds.
    """

    num_rows: int
    num_queries: int
    max_pages: int
    num_formats: int
    segments_per_row: int
    splits: int
    pages: int
    queries: int

    @property
    def num_query_blocks(self) -> int:
        """No batch of this shape needs more: every row may leave one query block partly filled."""
        if self.queries == 1:
            return self.num_queries
        return self.num_rows + self.num_queries // self.queries

    @property
    def num_segment_slots(self) -> int:
        return self.num_query_blocks * self.segments_per_row

    @property
    def splits_per_segment(self) -> int:
        return -(-self.max_pages // self.pages)

    @property
    def tiles_per_query_block(self) -> int:
        return self.segments_per_row * self.splits_per_segment

    @property
    def max_tiles(self) -> int:
        """No batch of this shape needs more: every format may leave one tile partly filled."""
        splits = self.num_segment_slots * self.splits_per_segment
        return splits if self.splits == 1 else -(-splits // self.splits) + self.num_formats


@dataclass(frozen=True, slots=True)
class _Placed:
    """A segment as one query block sees it, in its segment slot."""

    slot: int
    block: int
    segment: BatchSegment


def plan_tiles(
    segments: Sequence[BatchSegment], queries: Sequence[QueryRun], shape: TileShape, page_size: int
) -> Tiles:
    """Cuts the segments of a batch; those without tokens, and those of rows without queries, need no tile.

    Args:
        queries: of each row, in order.

    Raises:
        ValueError: more segments in a row, or longer ones, than the shape provides for; a segment of no such row.
    """
    tiles = _empty_tiles(shape)
    by_format = _place_segments(segments, _cut_queries(tiles, queries, shape), shape, page_size)
    per_block = np.zeros(shape.num_query_blocks, np.int32)
    for format_id, same in enumerate(by_format):
        first = split = int(tiles.starts[format_id]) * shape.splits
        for placed in same:
            end = _cut_segment(tiles, split, placed, shape, page_size)
            block, listed = placed.block, per_block[placed.block]
            own = np.arange(split // shape.splits, -(-end // shape.splits))
            own = own[int(listed > 0 and tiles.query_block_tiles[block, listed - 1] == own[0]) :]
            tiles.query_block_tiles[block, listed : listed + len(own)] = own
            per_block[block] += len(own)
            split = end
        tiles.starts[format_id + 1] = -(-split // shape.splits)
        tiles.format_ids[first // shape.splits : tiles.starts[format_id + 1]] = format_id
    return tiles


def _place_segments(
    segments: Sequence[BatchSegment], blocks_of_row: list[range], shape: TileShape, page_size: int
) -> list[list[_Placed]]:
    """Gives every segment a segment slot in each query block of its row; returns them by format."""
    by_format: list[list[_Placed]] = [[] for _ in range(shape.num_formats)]
    used = np.zeros(shape.num_query_blocks, np.int32)
    for segment in segments:
        if not segment.num_tokens:
            continue
        row, num_pages = segment.row, -(-segment.num_tokens // page_size)
        if not 0 <= row < len(blocks_of_row):
            raise ValueError(f"a segment is of row {row}, and queries are given for {len(blocks_of_row)} rows only")
        if num_pages > shape.max_pages:
            raise ValueError(
                f"a segment of row {row} has {num_pages} pages, more than max_pages={shape.max_pages}; "
                "cut it in two, or give the spec a larger max_pages"
            )
        for block in blocks_of_row[row]:
            if used[block] == shape.segments_per_row:
                raise ValueError(
                    f"row {row} has more than segments_per_row={shape.segments_per_row} segments; "
                    "give the spec a larger segments_per_row"
                )
            slot = block * shape.segments_per_row + int(used[block])
            used[block] += 1
            by_format[segment.format_id].append(_Placed(slot, block, segment))
    return by_format


def _empty_tiles(shape: TileShape) -> Tiles:
    by_split = (shape.max_tiles, shape.splits)
    return Tiles(
        segment_slots=np.full(by_split, shape.num_segment_slots, np.int32),
        pages=np.zeros((*by_split, shape.pages), np.int32),
        num_tokens=np.zeros(by_split, np.int32),
        positions=np.zeros(by_split, np.int32),
        format_ids=np.full(shape.max_tiles, shape.num_formats, np.int32),
        starts=np.zeros(shape.num_formats + 1, np.int32),
        query_block_tiles=np.full((shape.num_query_blocks, shape.tiles_per_query_block), shape.max_tiles, np.int32),
        query_starts=np.zeros(shape.num_query_blocks, np.int32),
        query_counts=np.zeros(shape.num_query_blocks, np.int32),
        query_positions=np.zeros(shape.num_query_blocks, np.int32),
        query_block=np.full(shape.num_queries, shape.num_query_blocks, np.int32),
        index_in_query_block=np.zeros(shape.num_queries, np.int32),
    )


def _cut_queries(tiles: Tiles, queries: Sequence[QueryRun], shape: TileShape) -> list[range]:
    """Cuts every row's queries into query blocks; returns the blocks of each row."""
    blocks_of_row, block = [], 0
    for run in queries:
        if shape.queries == 1:  # block b is query b, so that kernels need not look it up
            block = run.start
        first_block = block
        for done in range(0, run.num_queries, shape.queries):
            size, start = min(shape.queries, run.num_queries - done), run.start + done
            tiles.query_starts[block] = start
            tiles.query_counts[block] = size
            tiles.query_positions[block] = run.first_position + done
            tiles.query_block[start : start + size] = block
            tiles.index_in_query_block[start : start + size] = np.arange(size)
            block += 1
        blocks_of_row.append(range(first_block, block))
    return blocks_of_row


def _cut_segment(tiles: Tiles, split: int, placed: _Placed, shape: TileShape, page_size: int) -> int:
    """Writes the KV splits of a segment from number `split` on, over all tiles; returns the number behind the last."""
    segment, split_tokens = placed.segment, shape.pages * page_size
    num_pages, num_splits = -(-segment.num_tokens // page_size), -(-segment.num_tokens // split_tokens)
    own, passed = slice(split, split + num_splits), split_tokens * np.arange(num_splits)
    padded = np.zeros(num_splits * shape.pages, np.int32)
    padded[:num_pages] = segment.pages[:num_pages]
    tiles.segment_slots.reshape(-1)[own] = placed.slot
    tiles.pages.reshape(-1, shape.pages)[own] = padded.reshape(num_splits, shape.pages)
    tiles.num_tokens.reshape(-1)[own] = np.clip(segment.num_tokens - passed, 0, split_tokens)
    tiles.positions.reshape(-1)[own] = segment.first_position + passed
    return split + num_splits
