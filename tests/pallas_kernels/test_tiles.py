"""Tiles cover a batch's segments exactly, for every query block, within the static shape that was promised."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, TileShape, plan_tiles

PAGE_SIZE = 4


def make_shape(**changes) -> TileShape:
    shape = {"num_rows": 4, "num_queries": 4, "max_pages": 8, "num_formats": 1, "segments_per_row": 1}
    return TileShape(**shape | {"splits": 1, "pages": 1, "queries": 1} | changes)


@st.composite
def batches(draw):
    """A tile shape, and segments and queries that fit it: any number of segments of a row may share a format."""
    decodes, num_rows = draw(st.booleans()), draw(st.integers(1, 6))
    shape = TileShape(
        num_rows=num_rows,
        num_queries=num_rows if decodes else draw(st.integers(1, 40)),
        max_pages=draw(st.integers(1, 9)),
        num_formats=draw(st.integers(1, 4)),
        segments_per_row=draw(st.integers(1, 3)),
        splits=draw(st.integers(1, 5)),
        pages=draw(st.integers(1, 5)),
        queries=1 if decodes else draw(st.sampled_from([1, 2, 4, 16])),
    )
    segments, runs, slot = [], [], 0
    for row in range(num_rows):
        position = 0
        for i in range(draw(st.integers(0, shape.segments_per_row))):
            num_tokens = draw(st.integers(0, shape.max_pages * PAGE_SIZE))
            pages = [1000 * row + 100 * i + page for page in range(-(-num_tokens // PAGE_SIZE))]
            position += draw(st.integers(0, 3))
            segments.append(BatchSegment(row, draw(st.integers(0, shape.num_formats - 1)), pages, num_tokens, position))
            position += num_tokens
        if decodes:
            runs.append(QueryRun(row, draw(st.integers(0, 1)), draw(st.integers(0, 100))))
        else:
            slot += draw(st.integers(0, min(2, shape.num_queries - slot)))
            count = draw(st.integers(0, shape.num_queries - slot))
            runs.append(QueryRun(slot, count, draw(st.integers(0, 100))))
            slot += count
    return shape, draw(st.permutations(segments)), runs


def every_batch(test):
    return settings(max_examples=40)(given(batches())(test))


def plan(batch):
    shape, segments, runs = batch
    return plan_tiles(segments, runs, shape, PAGE_SIZE)


def blocks_of(tiles, run: QueryRun) -> set[int]:
    return set(tiles.query_block[run.start : run.start + run.num_queries].tolist())


def splits(tiles, shape: TileShape) -> Counter:
    """(format, block, page, position of its first token, tokens that count) of every page that the tiles cover."""
    found = Counter()
    for tile, format_id in enumerate(tiles.format_ids):
        for place, num_tokens in enumerate(tiles.num_tokens[tile]):
            block = int(tiles.segment_slots[tile, place]) // shape.segments_per_row
            for i in range(-(-int(num_tokens) // PAGE_SIZE)):
                done = i * PAGE_SIZE
                page, position = int(tiles.pages[tile, place, i]), int(tiles.positions[tile, place]) + done
                found[int(format_id), block, page, position, min(PAGE_SIZE, int(num_tokens) - done)] += 1
    return found


@every_batch
def test_the_tiles_cover_every_token_of_every_segment_once_for_each_block_of_its_rows_queries(batch):
    (shape, segments, runs), tiles = batch, plan(batch)
    expected = Counter(
        (segment.format_id, block, page, segment.first_position + done, min(PAGE_SIZE, segment.num_tokens - done))
        for segment in segments
        for block in blocks_of(tiles, runs[segment.row])
        for page, done in zip(segment.pages, range(0, segment.num_tokens, PAGE_SIZE), strict=True)
    )
    assert splits(tiles, shape) == expected


@every_batch
def test_blocks_cut_each_rows_queries_into_runs_of_the_most_a_block_holds(batch):
    (shape, _, runs), tiles = batch, plan(batch)
    block_of, index_in = np.full(shape.num_queries, shape.num_query_blocks), np.zeros(shape.num_queries, int)
    for run in runs:
        for i in range(run.num_queries):
            slot = run.start + i
            block_of[slot], index_in[slot] = tiles.query_block[slot], i % shape.queries
            assert tiles.query_starts[block_of[slot]] + index_in[slot] == slot
            assert tiles.query_positions[block_of[slot]] + index_in[slot] == run.first_position + i
            assert tiles.query_counts[block_of[slot]] == min(shape.queries, run.num_queries - i + index_in[slot])
        assert len(blocks_of(tiles, run)) == -(-run.num_queries // shape.queries)
    np.testing.assert_array_equal(tiles.query_block, block_of)
    np.testing.assert_array_equal(tiles.index_in_query_block, index_in)
    assert tiles.query_counts.sum() == sum(run.num_queries for run in runs)


@every_batch
def test_with_one_query_a_block_a_block_is_its_query(batch):
    """Whichever rows have one."""
    (shape, _, runs), tiles = batch, plan(batch)
    if shape.queries == 1:
        for run in runs:
            own = range(run.start, run.start + run.num_queries)
            assert tiles.query_block[own.start : own.stop].tolist() == list(own)


@every_batch
def test_the_tiles_of_a_format_follow_those_of_the_one_before_within_the_static_shape(batch):
    (shape, *_), tiles = batch, plan(batch)
    by_split, by_block = (shape.max_tiles, shape.splits), (shape.num_query_blocks,)
    assert tiles.segment_slots.shape == tiles.num_tokens.shape == tiles.positions.shape == by_split
    assert tiles.pages.shape == (*by_split, shape.pages)
    assert tiles.query_block_tiles.shape == (*by_block, shape.tiles_per_query_block)
    assert tiles.query_starts.shape == tiles.query_counts.shape == tiles.query_positions.shape == by_block
    assert tiles.query_block.shape == tiles.index_in_query_block.shape == (shape.num_queries,)
    assert {part.dtype for part in tiles} == {np.dtype(np.int32)}
    assert tiles.starts[0] == 0
    assert (np.diff(tiles.starts) >= 0).all()
    ids = [*np.repeat(np.arange(shape.num_formats), np.diff(tiles.starts))]
    assert tiles.format_ids.tolist() == ids + [shape.num_formats] * (shape.max_tiles - len(ids))


@every_batch
def test_splits_without_tokens_point_at_the_null_page(batch):
    (shape, *_), tiles = batch, plan(batch)
    used = np.arange(shape.pages) * PAGE_SIZE < tiles.num_tokens[..., None]
    assert not tiles.pages[~used].any()
    empty = tiles.segment_slots == shape.num_segment_slots
    assert (tiles.segment_slots <= shape.num_segment_slots).all()
    assert not tiles.num_tokens[empty].any()
    assert empty[tiles.starts[-1] :].all()
    assert not empty[: tiles.starts[-1], 0].any()


@every_batch
def test_a_segment_slot_is_in_one_format_and_only_a_formats_last_tile_has_room_left(batch):
    (shape, *_), tiles = batch, plan(batch)
    formats: dict[int, int] = {}
    for first, end, format_id in zip(tiles.starts[:-1], tiles.starts[1:], range(shape.num_formats), strict=True):
        slots = tiles.segment_slots[first:end].reshape(-1)
        num_splits = int((slots < shape.num_segment_slots).sum())
        assert (slots[:num_splits] < shape.num_segment_slots).all()
        assert end - first == -(-num_splits // shape.splits)
        assert all(formats.setdefault(slot, format_id) == format_id for slot in slots[:num_splits].tolist())


@every_batch
def test_a_block_knows_the_tiles_it_has_a_part_in(batch):
    (shape, *_), tiles = batch, plan(batch)
    blocks = tiles.segment_slots // shape.segments_per_row
    for block, listed in enumerate(tiles.query_block_tiles):
        own = np.flatnonzero((blocks == block).any(axis=1)).tolist()
        assert listed.tolist() == own + [shape.max_tiles] * (len(listed) - len(own))


def test_splits_of_long_and_short_segments_share_tiles():
    lengths = [1, 1, 1, 8 * PAGE_SIZE]
    segments = [BatchSegment(i, 0, list(range(1, 9)), n) for i, n in enumerate(lengths)]
    runs = [QueryRun(i, 1, n) for i, n in enumerate(lengths)]
    tiles = plan_tiles(segments, runs, make_shape(splits=2), PAGE_SIZE)
    splits = [-(-n // (make_shape().pages * PAGE_SIZE)) for n in lengths]
    assert tiles.starts.tolist() == [0, -(-sum(splits) // 2)]


def test_more_segments_than_the_shape_has_room_for_are_refused():
    segments, runs = [BatchSegment(0, 0, [1], 1, i) for i in range(3)], [QueryRun(0, 1, 3)]
    with pytest.raises(ValueError, match="row 0 has more than segments_per_row=2 segments"):
        plan_tiles(segments, runs, make_shape(segments_per_row=2), PAGE_SIZE)


def test_a_segment_longer_than_the_shape_allows_is_refused():
    segments, runs = [BatchSegment(0, 0, list(range(1, 10)), 33)], [QueryRun(0, 1, 33)]
    with pytest.raises(ValueError, match="9 pages, more than max_pages=8"):
        plan_tiles(segments, runs, make_shape(), PAGE_SIZE)
