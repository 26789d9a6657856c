"""Prefixes that are read once: nothing is lost or read twice, and attention is as textbook attention in float64 is."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import F32_TOLERANCE, Cache, Segment, assert_close
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import Exact, exact_attention, make_geometry

from fineserve_jax.pallas_kernels.cpu import library
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.pallas_kernels.operations import paged_attention, plan_attention
from fineserve_jax.pallas_kernels.shared_prefixes import find_shared_prefixes
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun

SIZE = 16


@st.composite
def batches(draw) -> list[BatchSegment]:
    """Rows whose pages are paths in a small tree, so that many begin alike, and some end in the middle of a page."""
    segments = []
    for row in range(draw(st.integers(1, 9))):
        path = draw(st.lists(st.integers(0, 1), max_size=5))
        pages = [int("1" + "".join(map(str, path[: depth + 1])), 2) for depth in range(len(path))]
        rest = draw(st.integers(0, SIZE)) if pages else 0
        count = (len(pages) - 1) * SIZE + rest if pages else 0
        segments.append(BatchSegment(row, draw(st.integers(0, 1)), pages, max(0, count)))
        if draw(st.booleans()):
            segments.append(BatchSegment(row, 1, [1000 + row], draw(st.integers(1, SIZE)), 5 * SIZE))
    return segments


def tokens_of(segment: BatchSegment) -> list[tuple[int, int, int, int]]:
    """Of each token its format, page, place in the page and position."""
    return [
        (segment.format_id, segment.pages[i // SIZE], i % SIZE, segment.first_position + i)
        for i in range(segment.num_tokens)
    ]


@given(batches(), st.integers(1, 6 * SIZE))
def test_each_row_sees_the_tokens_that_it_had(segments, min_saved):
    found = find_shared_prefixes(segments, SIZE, min_saved)
    seen: dict[int, list] = {segment.row: [] for segment in segments}
    for group, (shared, run) in enumerate(zip(found.segments, found.queries, strict=True)):
        assert (shared.row, shared.num_tokens) == (group, len(shared.pages) * SIZE)
        assert run.first_position >= shared.num_tokens  # all of them see all of it
        assert (run.num_queries - 1) * shared.num_tokens >= min_saved
        for row in found.rows[run.start : run.start + run.num_queries]:
            seen[row] += tokens_of(shared)
    assert len(set(found.rows)) == len(found.rows) == sum(run.num_queries for run in found.queries)
    for segment in found.rest:
        seen[segment.row] += tokens_of(segment)
    had: dict[int, list] = {segment.row: [] for segment in segments}
    for segment in segments:
        had[segment.row] += tokens_of(segment)
    assert {row: sorted(own) for row, own in seen.items()} == {row: sorted(own) for row, own in had.items()}
    read = sum(segment.num_tokens for segment in [*found.rest, *found.segments])
    assert found.num_saved == sum(segment.num_tokens for segment in segments) - read


def test_a_group_is_the_rows_that_save_most():
    """Three rows have four pages in common; with the fourth it would be one."""
    alike = [BatchSegment(row, 0, [1, 2, 3, 4, 10 + row], 5 * SIZE) for row in range(3)]
    found = find_shared_prefixes([BatchSegment(3, 0, [1, 9], 2 * SIZE), *alike], SIZE, 1)
    assert (sorted(found.rows), found.segments[0].pages, found.num_saved) == ([0, 1, 2], [1, 2, 3, 4], 2 * 4 * SIZE)


NUM_ROWS, PAGES = 6, 5
GEOMETRY = make_geometry(num_layers=2, kv_heads=2, head_dim=64)


def make_spec(implementation: str, num_rows: int, num_queries: int | None = None) -> AttentionSpec:
    formats = tuple(map(get_format, ("bf16", "int8", "int4")))
    return AttentionSpec(GEOMETRY, formats, num_rows, PAGES, num_queries, 2, implementation=implementation)


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options={"xla_backend_optimization_level": 0})
def attend_both(spec, shared_spec, q, arena, tiles, shared_tiles, rows, places):
    own = paged_attention(spec, q, arena, tiles, 1)
    shared = paged_attention(shared_spec, q[rows], arena, shared_tiles, 1)
    seen = own.merge(PartialAttention(*(part[places] for part in shared)))
    return seen.output(), seen.log_sum_exp


@pytest.mark.parametrize("implementation", ["xla", "cpu"])
@pytest.mark.parametrize("name", ["bf16", "int8", "int4"])
def test_attention_in_two_parts_equals_textbook_attention(implementation, name):
    """Rows 0, 2, 3 and 5 begin with the pages of row 0, as far as those reach."""
    if implementation == "cpu" and library.why_unavailable() is not None:
        pytest.skip(str(library.why_unavailable()))
    spec, shared_spec = make_spec(implementation, NUM_ROWS), make_spec(implementation, NUM_ROWS // 2, NUM_ROWS)
    rng, lengths = np.random.default_rng(7), {0: 3, 1: 2, 2: 5, 3: 3, 4: 1, 5: 4}
    cache = Cache(spec, [Segment(row, name, pages * SIZE) for row, pages in lengths.items()], rng)
    common, kept, segments = {0, 2, 3, 5}, [], []
    for segment in cache.segments:
        _, k, v = cache.of(segment.row, 1, GEOMETRY)
        if segment.row in common:
            segment = BatchSegment(
                segment.row,
                segment.format_id,
                [*cache.segments[0].pages[:3], *segment.pages[3:]],
                segment.num_tokens,
            )
            first_k, first_v = (part[:, : 3 * SIZE] for part in cache.of(0, 1, GEOMETRY)[1:])
            k, v = (np.concatenate([a, b[:, 3 * SIZE :]], axis=1) for a, b in ((first_k, k), (first_v, v)))
        segments.append(segment)
        kept.append((k, v))
    found = find_shared_prefixes(segments, SIZE, 1)
    assert (set(found.rows), found.num_saved) == (common, 3 * 3 * SIZE)
    runs = [QueryRun(row, 1, pages * SIZE) for row, pages in lengths.items()]
    rows = np.array([*found.rows, *sorted(set(range(NUM_ROWS)) - common)], np.int32)
    tiles = plan_attention(spec, found.rest, runs)
    shared_tiles = plan_attention(shared_spec, found.segments, found.queries)
    q = rng.standard_normal((NUM_ROWS, 2, 3, GEOMETRY.head_dim), np.float32) / 4
    flat = jnp.asarray(q.reshape(NUM_ROWS, 6, -1))
    output, log_sum = attend_both(
        spec, shared_spec, flat, cache.arena, tiles, shared_tiles, rows, np.argsort(rows).astype(np.int32)
    )
    exact = [exact_attention(q[row : row + 1], k, v) for row, (k, v) in enumerate(kept)]
    expected = Exact(*(np.concatenate(parts) for parts in zip(*exact, strict=True)))
    found_attention = Exact(np.asarray(output).reshape(q.shape), np.asarray(log_sum).reshape(q.shape[:3]))
    assert_close(found_attention, expected, F32_TOLERANCE)
