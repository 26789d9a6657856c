"""Attention of rows with any number of queries, chunks and decodes mixed, to their cached tokens.

Queries may lie behind all cached tokens of their row, as a prefill chunk's do, or among them: then each sees those up
to its own position.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_FORMATS,
    PAGES,
    SMALL,
    SMALL_TPU,
    Cache,
    Row,
    check_attention,
    make_cache,
    paged_attention,
    rows,
)

from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import QueryRun

ROWS, GROUP, SLOTS = 4, 3, 160
SIZE = SMALL.page_size
assert get_backend("xla").tiling.ragged.queries < SLOTS, "a row should be able to fill more than one block"
PLAIN = AttentionSpec(
    SMALL,
    tuple(ALL_FORMATS.values()),
    num_rows=ROWS,
    num_queries=SLOTS,
    max_pages=PAGES,
    segments_per_row=3,
    implementation="xla",
)
FEW = tuple(ALL_FORMATS[name] for name in ("bf16", "int8", "int4"))
Query = tuple[list[tuple[str, int]], int, int]  # a row: segments of (format, tokens), queries, position of the first


def queries(rng: np.random.Generator, sharpness: float = 1.0) -> np.ndarray:
    shape = (SLOTS, SMALL.kv_heads * GROUP, SMALL.head_dim)
    return rng.standard_normal(shape, np.float32) * np.float32(sharpness / SMALL.head_dim**0.5)


def check(spec: AttentionSpec, batch: list[Query], seed: int, sharpness: float = 1.0) -> None:
    """Rows whose queries lie side by side."""
    rng = np.random.default_rng(seed)
    segments = [Row([(name, num_tokens, 0) for name, num_tokens in row]) for row, _, _ in batch]
    cache, _ = make_cache(spec, segments, rng)
    starts = np.cumsum([0] + [count for _, count, _ in batch]).tolist()
    runs = [QueryRun(start, count, position) for start, (_, count, position) in zip(starts, batch, strict=False)]
    check_attention(spec, cache, queries(rng, sharpness), runs)


def batches(spec: AttentionSpec) -> st.SearchStrategy:
    """Rows with unused slots before each, and any number of queries, as far as there are slots; a seed."""
    counts = st.sampled_from([0, 1, 1, SIZE, SLOTS]) | st.integers(0, SLOTS // 2)
    row = st.tuples(rows(spec), st.integers(0, 5), counts)
    return st.tuples(st.lists(row, min_size=1, max_size=ROWS), st.integers(0, 2**32 - 1))


def check_batch(spec: AttentionSpec, batch, *, sharpness: float = 1.0, sinks: bool = False) -> None:
    drawn, seed = batch
    rng = np.random.default_rng(seed)
    cache, positions = make_cache(spec, [row for row, _, _ in drawn], rng)
    runs, slot = [], 0
    for position, (_, unused, count) in zip(positions, drawn, strict=True):
        slot = min(slot + unused, SLOTS)
        runs.append(QueryRun(slot, min(count, SLOTS - slot), position))
        slot += runs[-1].num_queries
    logits = 2 * rng.standard_normal(SMALL.kv_heads * GROUP, np.float32) if sinks else None
    check_attention(spec, cache, queries(rng, sharpness), runs, logits)


@settings(max_examples=20)
@given(batches(PLAIN))
def test_rows_of_all_formats_with_any_number_of_queries(batch):
    check_batch(PLAIN, batch)


LIMITED = dataclasses.replace(PLAIN, formats=FEW, window=20, soft_cap=2.0)


@settings(max_examples=15)
@given(batches(LIMITED))
def test_with_a_window_a_soft_cap_and_sinks(batch):
    check_batch(LIMITED, batch, sharpness=3, sinks=True)


ONE = tuple(ALL_FORMATS[name] for name in ("int8",))


@pytest.mark.parametrize("limit", [{"window": 1}, {"window": 3 * SIZE}, {"soft_cap": 0.5}], ids=str)
def test_each_limit_alone(limit):
    """A window of 1 leaves a query its own position."""
    batch = [([("int8", 90)], 60, 50), ([("int8", 17), ("int8", 100)], 1, 80), ([("int8", 40)], 40, 0)]
    check(dataclasses.replace(PLAIN, formats=ONE, **limit), batch, seed=1, sharpness=3)


def test_sinks_alone():
    """They are merged outside the kernels: a query without keys has all its weight in the sink, and output 0."""
    rng, spec = np.random.default_rng(2), dataclasses.replace(PLAIN, formats=ONE)
    cache = Cache(SMALL, rng, ONE)
    cache.add(0, "int8", 40)
    sinks = rng.standard_normal(SMALL.kv_heads * GROUP, np.float32)
    runs = [QueryRun(0, 5, 38), QueryRun(5, 2, 0)]
    check_attention(spec, cache, queries(rng), runs, sinks)
    seen = paged_attention(spec, queries(rng), cache.arena, cache.plan(spec, runs), 0, sinks)
    np.testing.assert_allclose(seen.log_sum_exp[5:7], np.stack([sinks] * 2), rtol=1e-6)
    assert not np.asarray(seen.output())[5:7].any()


def test_queries_before_all_keys_see_nothing():
    """Output 0 and l 0, as for a row without cached tokens."""
    rng = np.random.default_rng(3)
    cache = Cache(SMALL, rng)
    for name in ALL_FORMATS:
        cache.segments.clear()
        cache.kept.clear()
        cache.add(0, name, 2 * SIZE, first_position=100)
        runs = [QueryRun(0, 40, 59), QueryRun(40, 3, 7)]
        check_attention(PLAIN, cache, queries(rng), runs, layers=[0])
        seen = paged_attention(PLAIN, queries(rng), cache.arena, cache.plan(PLAIN, runs), 0)
        assert not np.asarray(seen.l).any()
        assert not np.asarray(seen.acc).any()
        assert np.isneginf(seen.log_sum_exp).all()


def test_a_row_that_fills_all_blocks_sees_a_long_prefix():
    check(PLAIN, [([("int4", PAGES * SIZE), ("fp32", PAGES * SIZE), ("int4", 5)], SLOTS, 2 * PAGES * SIZE + 5)], seed=4)


def test_a_chunk_whose_own_tokens_are_cached_already_is_causal():
    batch = [([("int8", 5 * SIZE)], 5 * SIZE, 0), ([("fp32", 3)], 3, 0), ([("int4", 64), ("bf16", 9)], 40, 64 + 9 - 40)]
    check(PLAIN, batch, seed=5)


def test_decodes_beside_a_chunk():
    batch = [([("bf16", 33)], 1, 33), ([("int8", 100)], 70, 100), ([("fp8", SIZE)], 1, SIZE), ([("int2", 48)], 2, 48)]
    check(PLAIN, batch, seed=6)


def test_in_an_arena_of_tpu_tiles():
    spec = dataclasses.replace(PLAIN, geometry=SMALL_TPU, formats=FEW)
    batch = [([("bf16", 33)], 1, 33), ([("int8", 100), ("int4", 80)], 70, 120), ([("bf16", SIZE)], SIZE, 0)]
    check(spec, batch, seed=7)


def test_queries_in_bf16_are_taken_as_the_numbers_they_are():
    rng, spec = np.random.default_rng(8), dataclasses.replace(PLAIN, formats=ONE)
    cache = Cache(SMALL, rng, ONE)
    cache.add(0, "int8", 50)
    check_attention(spec, cache, jnp.asarray(queries(rng), jnp.bfloat16), [QueryRun(3, 70, 20)])


# -- what a spec refuses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0 hides every key"),
        ({"soft_cap": 0.0}, r"soft_cap=0\.0 is no positive number"),
        ({"soft_cap": float("nan")}, "soft_cap=nan is no positive number"),
        (
            {"implementation": "cuda"},
            "implementation='cuda' is no implementation; use one of xla, cpu, triton, mosaic_tpu",
        ),
    ],
    ids=str,
)
def test_a_spec_that_makes_no_sense_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAIN, **change)
