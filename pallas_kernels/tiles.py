"""Cutting a batch's segments into tiles of one size, on the host.

A tile is what one pass of an attention loop, or one program of an attention kernel, reads: up to `rows` segments of one
format by up to `pages` pages of each, for a block of up to `queries` query tokens. How many tiles there are is data,
not shape, so one compiled program serves any mix of formats and lengths. A row with more queries than a block holds
takes several blocks, each with tiles of its own; a segment with more pages than a tile takes several tiles.

Segments of a format are sorted by length before they are cut, so that those which share a tile are about equally long.
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
    """A row's query tokens: adjacent slots of the query axis, at adjacent positions.

    Attributes:
        first_slot: the first of its slots.
        num_queries: how many.
        first_position: position of the first of them in the row's sequence.
    """

    first_slot: int
    num_queries: int
    first_position: int


class Tiles(NamedTuple):
    """A batch's cached tokens as equal tiles; numpy on the host, the same on the device.

    A tile of S segments by P pages. Segments lie in slots, `segments_per_row` of each block side by side.

    Attributes:
        slots: i32[max_tiles, S]; `num_slots` (one past the last) where there is no segment.
        pages: i32[max_tiles, S, P]; 0, the null page, where there is none.
        num_tokens: i32[max_tiles, S], the tokens of the tile's pages that count.
        positions: i32[max_tiles, S], position of the first of them.
        format_ids: i32[max_tiles]; `num_formats` where there is no tile.
        starts: i32[formats + 1]: the tiles of format f are `starts[f]` to `starts[f + 1]`.
        block_tiles: i32[num_blocks, tiles_per_block], the tiles that each block has a part in, in order; `max_tiles`
            behind them.
        query_slots, query_counts, query_positions: i32[num_blocks], of each block the first slot, the number of
            queries (0: no such block) and the position of the first.
        block_of_query, place_in_block: i32[num_queries]; `num_blocks` and 0 for slots without a query.
    """

    slots: Array
    pages: Array
    num_tokens: Array
    positions: Array
    format_ids: Array
    starts: Array
    block_tiles: Array
    query_slots: Array
    query_counts: Array
    query_positions: Array
    block_of_query: Array
    place_in_block: Array


@dataclass(frozen=True)
class TileShape:
    """The static shape of a batch's tiles.

    Attributes:
        num_rows: rows of the batch.
        num_queries: slots of the query axis.
        max_pages: pages of the longest segment there can be.
        num_formats: formats of the program.
        segments_per_row: most segments a row has.
        rows, pages: segments and pages a tile holds.
        queries: query tokens a block holds.
    """

    num_rows: int
    num_queries: int
    max_pages: int
    num_formats: int
    segments_per_row: int
    rows: int
    pages: int
    queries: int

    @property
    def num_blocks(self) -> int:
        """No batch of this shape needs more: every row may leave one block partly filled."""
        if self.queries == 1:
            return self.num_queries
        return self.num_rows + self.num_queries // self.queries

    @property
    def num_slots(self) -> int:
        return self.num_blocks * self.segments_per_row

    @property
    def tiles_per_segment(self) -> int:
        return -(-self.max_pages // self.pages)

    @property
    def tiles_per_block(self) -> int:
        return self.segments_per_row * self.tiles_per_segment

    @property
    def max_tiles(self) -> int:
        """No batch of this shape needs more: every format may leave one group of segments partly filled."""
        groups = self.num_slots if self.rows == 1 else -(-self.num_slots // self.rows) + self.num_formats
        return groups * self.tiles_per_segment


@dataclass(frozen=True, slots=True)
class _Piece:
    """A segment as one block of queries sees it, in its slot."""

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
    count, per_block = 0, np.zeros(shape.num_blocks, np.int32)
    for format_id, same in enumerate(by_format):
        for first in range(0, len(same), shape.rows):
            group = same[first : first + shape.rows]
            num_tiles = _cut_group(tiles, count, group, shape, page_size)
            for block in {piece.block for piece in group}:
                own = per_block[block] + np.arange(num_tiles)
                tiles.block_tiles[block, own] = count + np.arange(num_tiles)
                per_block[block] += num_tiles
            count += num_tiles
        tiles.starts[format_id + 1] = count
        tiles.format_ids[tiles.starts[format_id] : count] = format_id
    return tiles


def _place_segments(
    segments: Sequence[BatchSegment], blocks_of_row: list[range], shape: TileShape, page_size: int
) -> list[list[_Piece]]:
    """Gives every segment a slot in each block of its row; returns them by format, longest first."""
    by_format: list[list[_Piece]] = [[] for _ in range(shape.num_formats)]
    used = np.zeros(shape.num_blocks, np.int32)
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
            by_format[segment.format_id].append(_Piece(slot, block, segment))
    for same in by_format:
        same.sort(key=lambda piece: -piece.segment.num_tokens)
    return by_format


def _empty_tiles(shape: TileShape) -> Tiles:
    by_segment = (shape.max_tiles, shape.rows)
    return Tiles(
        slots=np.full(by_segment, shape.num_slots, np.int32),
        pages=np.zeros((*by_segment, shape.pages), np.int32),
        num_tokens=np.zeros(by_segment, np.int32),
        positions=np.zeros(by_segment, np.int32),
        format_ids=np.full(shape.max_tiles, shape.num_formats, np.int32),
        starts=np.zeros(shape.num_formats + 1, np.int32),
        block_tiles=np.full((shape.num_blocks, shape.tiles_per_block), shape.max_tiles, np.int32),
        query_slots=np.zeros(shape.num_blocks, np.int32),
        query_counts=np.zeros(shape.num_blocks, np.int32),
        query_positions=np.zeros(shape.num_blocks, np.int32),
        block_of_query=np.full(shape.num_queries, shape.num_blocks, np.int32),
        place_in_block=np.zeros(shape.num_queries, np.int32),
    )


def _cut_queries(tiles: Tiles, queries: Sequence[QueryRun], shape: TileShape) -> list[range]:
    """Cuts every row's queries into blocks; returns the blocks of each row."""
    blocks_of_row, block = [], 0
    for run in queries:
        if shape.queries == 1:  # block b is slot b, so that kernels need not look it up
            block = run.first_slot
        first_block = block
        for done in range(0, run.num_queries, shape.queries):
            size, slot = min(shape.queries, run.num_queries - done), run.first_slot + done
            tiles.query_slots[block] = slot
            tiles.query_counts[block] = size
            tiles.query_positions[block] = run.first_position + done
            tiles.block_of_query[slot : slot + size] = block
            tiles.place_in_block[slot : slot + size] = np.arange(size)
            block += 1
        blocks_of_row.append(range(first_block, block))
    return blocks_of_row


def _cut_group(tiles: Tiles, count: int, group: list[_Piece], shape: TileShape, page_size: int) -> int:
    """Writes the tiles of up to `shape.rows` segments from tile `count` on; returns how many these are."""
    tile_tokens = shape.pages * page_size
    num_tiles = -(-group[0].segment.num_tokens // tile_tokens)
    for place, piece in enumerate(group):
        segment = piece.segment
        num_pages = -(-segment.num_tokens // page_size)
        padded = np.zeros(num_tiles * shape.pages, np.int32)
        padded[:num_pages] = segment.pages[:num_pages]
        own, passed = slice(count, count + num_tiles), tile_tokens * np.arange(num_tiles)
        tiles.slots[own, place] = piece.slot
        tiles.pages[own, place] = padded.reshape(num_tiles, shape.pages)
        tiles.num_tokens[own, place] = np.clip(segment.num_tokens - passed, 0, tile_tokens)
        tiles.positions[own, place] = segment.first_position + passed
    return num_tiles
