"""Tiles cover a batch's segments exactly, in as few programs' worth of shape as promised."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.pallas_kernels.xla.tiles import BatchSegment, TileShape, plan_tiles

PAGE_SIZE = 4


@st.composite
def batches(draw):
    """A tile shape and segments that fit it: a row has no two of one format."""
    shape = TileShape(
        num_rows=draw(st.integers(1, 9)),
        max_pages=draw(st.integers(1, 9)),
        rows=draw(st.integers(1, 5)),
        pages=draw(st.integers(1, 5)),
        num_formats=draw(st.integers(1, 4)),
        segments_per_row=draw(st.integers(1, 2)),
    )
    segments = []
    for row in range(shape.num_rows):
        formats = draw(st.permutations(range(shape.num_formats)))
        for format_id in formats[: draw(st.integers(0, shape.segments_per_row))]:
            num_tokens = draw(st.integers(0, shape.max_pages * PAGE_SIZE))
            pages = [1000 * row + 100 * format_id + i for i in range(-(-num_tokens // PAGE_SIZE))]
            segments.append(BatchSegment(row, format_id, pages, num_tokens))
    return shape, draw(st.permutations(segments))


def pieces(tiles) -> Counter:
    """(format, row, page, how many of its tokens count) of every page that the tiles cover."""
    found = Counter()
    for format_id in range(len(tiles.starts) - 1):
        for tile in range(tiles.starts[format_id], tiles.starts[format_id + 1]):
            for row, pages, num_tokens in zip(tiles.rows[tile], tiles.pages[tile], tiles.num_tokens[tile], strict=True):
                for i in range(-(-int(num_tokens) // PAGE_SIZE)):
                    found[format_id, int(row), int(pages[i]), min(PAGE_SIZE, num_tokens - i * PAGE_SIZE)] += 1
    return found


@given(batches())
def test_the_tiles_cover_every_token_of_every_segment_once(batch):
    shape, segments = batch
    expected = Counter(
        (segment.format_id, segment.row, page, min(PAGE_SIZE, segment.num_tokens - i * PAGE_SIZE))
        for segment in segments
        for i, page in enumerate(segment.pages)
    )
    assert pieces(plan_tiles(segments, shape, PAGE_SIZE)) == expected


@given(batches())
def test_the_tiles_of_a_format_follow_those_of_the_one_before_within_the_static_shape(batch):
    shape, segments = batch
    tiles = plan_tiles(segments, shape, PAGE_SIZE)
    assert tiles.rows.shape == tiles.num_tokens.shape == (shape.max_tiles, shape.rows)
    assert tiles.pages.shape == (shape.max_tiles, shape.rows, shape.pages)
    assert tiles.starts[0] == 0
    assert (np.diff(tiles.starts) >= 0).all()
    assert tiles.starts[-1] <= shape.max_tiles
    assert {part.dtype for part in tiles} == {np.dtype(np.int32)}


@given(batches())
def test_places_without_tokens_point_at_the_null_page(batch):
    shape, segments = batch
    tiles = plan_tiles(segments, shape, PAGE_SIZE)
    used = np.arange(shape.pages) * PAGE_SIZE < tiles.num_tokens[..., None]
    assert not tiles.pages[~used].any()
    assert ((tiles.rows < shape.num_rows) | ((tiles.rows == shape.num_rows) & (tiles.num_tokens == 0))).all()
    assert (tiles.rows[tiles.starts[-1] :] == shape.num_rows).all()


@given(batches())
def test_no_row_is_twice_in_a_tile(batch):
    """The decode kernel scatters a tile's rows back, which two of a kind would spoil."""
    shape, segments = batch
    for rows in plan_tiles(segments, shape, PAGE_SIZE).rows:
        real = rows[rows < shape.num_rows]
        assert len(set(real.tolist())) == len(real)


def test_segments_of_like_length_share_tiles():
    """Long ones first: one long segment among short ones does not make all of them take many tiles."""
    shape = TileShape(num_rows=4, max_pages=8, rows=2, pages=1, num_formats=1, segments_per_row=1)
    lengths = [1, 8 * PAGE_SIZE, 1, 8 * PAGE_SIZE]
    segments = [BatchSegment(i, 0, list(range(1, 9)), n) for i, n in enumerate(lengths)]
    assert plan_tiles(segments, shape, PAGE_SIZE).starts.tolist() == [0, 9]
