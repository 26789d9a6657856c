"""Cutting a batch's segments into tiles of one size, on the host.

A segment is cut into pieces of up to `pages` pages. A tile is what one pass of an attention loop, or one program of an
attention kernel, reads: up to `rows` pieces of one format, for a block of up to `queries` query tokens. Pieces fill one
tile after the other, whichever segments they are of, so that little of a tile is padding. How many tiles there are is
data, not shape: one compiled program serves any mix of formats and lengths. A row with more queries than a block holds
takes several blocks, each with tiles of its own.
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

    A tile of S pieces of segments by P pages. Segments lie in slots, `segments_per_row` of each block side by side.

    Attributes:
        slots: i32[max_tiles, S], of the piece's segment; `num_slots` (one past the last) where there is no piece.
        pages: i32[max_tiles, S, P]; 0, the null page, where there is none.
        num_tokens: i32[max_tiles, S], the tokens of the piece's pages that count.
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
        rows, pages: pieces that a tile holds, and pages of a piece.
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
    def pieces_per_segment(self) -> int:
        return -(-self.max_pages // self.pages)

    @property
    def tiles_per_block(self) -> int:
        return self.segments_per_row * self.pieces_per_segment

    @property
    def max_tiles(self) -> int:
        """No batch of this shape needs more: every format may leave one tile partly filled."""
        pieces = self.num_slots * self.pieces_per_segment
        return pieces if self.rows == 1 else -(-pieces // self.rows) + self.num_formats


@dataclass(frozen=True, slots=True)
class _Placed:
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
    per_block = np.zeros(shape.num_blocks, np.int32)
    for format_id, same in enumerate(by_format):
        first = place = int(tiles.starts[format_id]) * shape.rows
        for placed in same:
            end = _cut_segment(tiles, place, placed, shape, page_size)
            block, listed = placed.block, per_block[placed.block]
            own = np.arange(place // shape.rows, -(-end // shape.rows))
            own = own[int(listed > 0 and tiles.block_tiles[block, listed - 1] == own[0]) :]
            tiles.block_tiles[block, listed : listed + len(own)] = own
            per_block[block] += len(own)
            place = end
        tiles.starts[format_id + 1] = -(-place // shape.rows)
        tiles.format_ids[first // shape.rows : tiles.starts[format_id + 1]] = format_id
    return tiles


def _place_segments(
    segments: Sequence[BatchSegment], blocks_of_row: list[range], shape: TileShape, page_size: int
) -> list[list[_Placed]]:
    """Gives every segment a slot in each block of its row; returns them by format."""
    by_format: list[list[_Placed]] = [[] for _ in range(shape.num_formats)]
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
            by_format[segment.format_id].append(_Placed(slot, block, segment))
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


def _cut_segment(tiles: Tiles, place: int, placed: _Placed, shape: TileShape, page_size: int) -> int:
    """Writes the pieces of a segment from `place` on, counted over all tiles' places; returns where the next begin."""
    segment, piece_tokens = placed.segment, shape.pages * page_size
    num_pages, num_pieces = -(-segment.num_tokens // page_size), -(-segment.num_tokens // piece_tokens)
    own, passed = slice(place, place + num_pieces), piece_tokens * np.arange(num_pieces)
    padded = np.zeros(num_pieces * shape.pages, np.int32)
    padded[:num_pages] = segment.pages[:num_pages]
    tiles.slots.reshape(-1)[own] = placed.slot
    tiles.pages.reshape(-1, shape.pages)[own] = padded.reshape(num_pieces, shape.pages)
    tiles.num_tokens.reshape(-1)[own] = np.clip(segment.num_tokens - passed, 0, piece_tokens)
    tiles.positions.reshape(-1)[own] = segment.first_position + passed
    return place + num_pieces
