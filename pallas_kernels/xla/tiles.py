"""Cutting a batch's segments into tiles of one size, on the host.

A tile is what one pass of an attention loop reads: up to `rows` segments of one format by up to `pages` pages of each.
How many tiles there are is data, not shape: the loops run from `starts[f]` to `starts[f + 1]`, so one compiled program
serves any mix of formats and lengths.

Segments of a format are sorted by length before they are cut, so that those which share a tile are about equally long.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np


@dataclass(frozen=True, slots=True)
class BatchSegment:
    """A run of a row's cached tokens in one format: the unit of work of every attention kernel.

    Attributes:
        row: which row of the batch it belongs to.
        format_id: index into the program's formats.
        pages: first units of its pages, in order.
        num_tokens: how many tokens of those pages count.
    """

    row: int
    format_id: int
    pages: Sequence[int]
    num_tokens: int


class Tiles(NamedTuple):
    """A batch's cached tokens as equal tiles; numpy on the host, the same on the device.

    Attributes:
        rows: i32[max_tiles, S]; `num_rows` (one past the last row) where there is no segment.
        pages: i32[max_tiles, S, P]; 0, the null page, where there is none.
        num_tokens: i32[max_tiles, S], the tokens of the tile's pages that count.
        starts: i32[formats + 1]: the tiles of format f are `starts[f]` to `starts[f + 1]`.
    """

    rows: jax.Array | np.ndarray
    pages: jax.Array | np.ndarray
    num_tokens: jax.Array | np.ndarray
    starts: jax.Array | np.ndarray


@dataclass(frozen=True)
class TileShape:
    """The static shape of a batch's tiles.

    Attributes:
        num_rows: rows of the batch.
        max_pages: pages of the longest segment there can be.
        rows, pages: segments and pages a tile holds.
        num_formats: formats of the program.
        segments_per_row: most segments a row has.
    """

    num_rows: int
    max_pages: int
    rows: int
    pages: int
    num_formats: int
    segments_per_row: int

    @property
    def max_tiles(self) -> int:
        """No batch of this shape needs more: every format may leave one group of segments partly filled."""
        groups = -(-self.num_rows * self.segments_per_row // self.rows) + self.num_formats
        return groups * -(-self.max_pages // self.pages)


def plan_tiles(segments: Sequence[BatchSegment], shape: TileShape, page_size: int) -> Tiles:
    """Cuts the segments of a batch; those without tokens need no tile.

    Raises:
        ValueError: two segments of one row in one format, whose results would overwrite each other.
    """
    tiles = Tiles(
        rows=np.full((shape.max_tiles, shape.rows), shape.num_rows, np.int32),
        pages=np.zeros((shape.max_tiles, shape.rows, shape.pages), np.int32),
        num_tokens=np.zeros((shape.max_tiles, shape.rows), np.int32),
        starts=np.zeros(shape.num_formats + 1, np.int32),
    )
    by_format: list[list[BatchSegment]] = [[] for _ in range(shape.num_formats)]
    for segment in segments:
        if segment.num_tokens:
            by_format[segment.format_id].append(segment)
    count = 0
    for format_id, same in enumerate(by_format):
        if len({segment.row for segment in same}) < len(same):
            raise ValueError(f"a row has two segments in format {format_id}; join their pages into one segment")
        same.sort(key=lambda segment: -segment.num_tokens)
        for first in range(0, len(same), shape.rows):
            count = _cut_group(tiles, count, same[first : first + shape.rows], shape, page_size)
        tiles.starts[format_id + 1] = count
    return tiles


def _cut_group(tiles: Tiles, count: int, group: list[BatchSegment], shape: TileShape, page_size: int) -> int:
    """Writes the tiles of up to `shape.rows` segments from tile `count` on; returns the next free tile."""
    tile_tokens = shape.pages * page_size
    num_tiles = -(-group[0].num_tokens // tile_tokens)
    for slot, segment in enumerate(group):
        num_pages = -(-segment.num_tokens // page_size)
        padded = np.zeros(num_tiles * shape.pages, np.int32)
        padded[:num_pages] = segment.pages[:num_pages]
        own = slice(count, count + num_tiles)
        tiles.rows[own, slot] = segment.row
        tiles.pages[own, slot] = padded.reshape(num_tiles, shape.pages)
        past = segment.num_tokens - tile_tokens * np.arange(num_tiles)
        tiles.num_tokens[own, slot] = np.clip(past, 0, tile_tokens)
    return count + num_tiles
