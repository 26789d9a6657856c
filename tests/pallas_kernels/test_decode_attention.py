"""Decode attention over pages of many formats equals textbook attention over what the pages stand for."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_FORMATS,
    GEOMETRIES,
    PAGE_FORMATS,
    PAGES,
    SMALL,
    SMALL_TPU,
    TOKEN_FORMATS,
    TOLERANCE,
    Cache,
    Row,
    check_attention,
    exact_attention,
    make_cache,
    paged_attention,
    relative_error,
    rows,
)

from fineserve_jax.pallas_kernels.operations import plan_attention
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import QueryRun

ROWS, GROUP = len(ALL_FORMATS), 3
PLAIN = AttentionSpec(
    SMALL, tuple(ALL_FORMATS.values()), num_rows=ROWS, max_pages=PAGES, segments_per_row=3, implementation="xla"
)
Segments = list[tuple[str, int]]  # of a row: (format, tokens)


def with_formats(*names: str, **changes) -> AttentionSpec:
    """For fewer formats: a program takes a second to compile for each."""
    return dataclasses.replace(PLAIN, formats=tuple(ALL_FORMATS[name] for name in names), **changes)


# Each of these alone is the business of the tests of ragged attention.
LIMITED = with_formats("fp32", "int8", "int4", window=20, soft_cap=2.0)


def queries(rng: np.random.Generator, geometry, group: int = GROUP, sharpness: float = 1.0) -> np.ndarray:
    shape = (ROWS, geometry.kv_heads * group, geometry.head_dim)
    return rng.standard_normal(shape, np.float32) * np.float32(sharpness / geometry.head_dim**0.5)


def cache_of(
    spec: AttentionSpec, segments_of_rows: list[Segments], rng: np.random.Generator
) -> tuple[Cache, list[QueryRun]]:
    """A cache, and the query that follows each row's tokens in it."""
    batch = [Row([(name, num_tokens, 0) for name, num_tokens in segments]) for segments in segments_of_rows]
    cache, positions = make_cache(spec, batch + [Row([])] * (ROWS - len(batch)), rng)
    return cache, [QueryRun(row, 1, position) for row, position in enumerate(positions)]


def check(
    spec: AttentionSpec, segments_of_rows: list[Segments], seed: int, group: int = GROUP, sharpness: float = 1.0
) -> None:
    rng = np.random.default_rng(seed)
    cache, runs = cache_of(spec, segments_of_rows, rng)
    check_attention(spec, cache, queries(rng, spec.geometry, group, sharpness), runs)


def batches(spec: AttentionSpec) -> st.SearchStrategy:
    """As many rows as there are formats, some without a query; a seed."""
    row = st.tuples(rows(spec), st.sampled_from([1, 1, 1, 0]))
    return st.tuples(st.lists(row, min_size=ROWS, max_size=ROWS), st.integers(0, 2**32 - 1))


def check_batch(spec: AttentionSpec, batch, *, sharpness: float = 1.0, sinks: bool = False) -> None:
    drawn, seed = batch
    rng = np.random.default_rng(seed)
    cache, positions = make_cache(spec, [row for row, _ in drawn], rng)
    runs = [QueryRun(row, count, positions[row]) for row, (_, count) in enumerate(drawn)]
    logits = 2 * rng.standard_normal(SMALL.kv_heads * GROUP, np.float32) if sinks else None
    check_attention(spec, cache, queries(rng, SMALL, sharpness=sharpness), runs, logits)


@settings(max_examples=15)
@given(batches(PLAIN))
def test_rows_of_all_formats_in_one_batch(batch):
    check_batch(PLAIN, batch)


@settings(max_examples=15)
@given(batches(LIMITED))
def test_with_a_window_a_soft_cap_and_sinks(batch):
    check_batch(LIMITED, batch, sharpness=3, sinks=True)


@pytest.mark.parametrize(
    ("geometry", "group", "names"),
    [
        (SMALL, 1, ("bf16", "int8")),
        (GEOMETRIES[1], 4, ("bf16", "fp8", "int4")),
        (GEOMETRIES[2], 2, ("int8", "int4")),
        (GEOMETRIES[3], 8, ("fp32", "int8")),
        (SMALL_TPU, 3, ("fp32", "int8", "int4", "int2")),
    ],
    ids=["1 of 64", "4 of 96", "2 of 128", "8 of 256", "tpu"],
)
def test_groups_of_query_heads_share_their_key_head(geometry, group, names):
    """In all geometries."""
    size = geometry.page_size
    every = [[(name, length)] for name in names for length in (37, PAGES * size)]
    check(with_formats(*names, geometry=geometry), every, seed=group, group=group)


@pytest.mark.parametrize("num_tokens", [0, 1, 15, 16, 17, 33, 128])
def test_rows_end_anywhere_in_a_page(num_tokens):
    """In formats that take whole pages, full ones and a residual page in int8."""
    whole = num_tokens // 16 * 16
    paged = [[(name, whole), ("int8", num_tokens - whole)] for name in PAGE_FORMATS]
    check(PLAIN, [*([(name, num_tokens)] for name in TOKEN_FORMATS), *paged], seed=num_tokens)


def test_one_logit_far_above_the_others_does_not_overflow():
    check(PLAIN, [[("int8", 100)], [("int4", 64), ("bf16", 7)], [("fp8", 100)], [("fp32", 20)]], seed=5, sharpness=8)


def test_queries_in_bf16_are_taken_as_the_numbers_they_are():
    rng, spec = np.random.default_rng(6), with_formats("bf16", "int8")
    cache, runs = cache_of(spec, [[("int8", 40)], [("bf16", 17)]], rng)
    check_attention(spec, cache, jnp.asarray(queries(rng, SMALL), jnp.bfloat16), runs)


# -- results merge -----------------------------------------------------------------------------------------

MIXED: list[Segments] = [[("int4", 48), ("bf16", 9)], [("fp32", 30)], [("int8", 128), ("fp8", 5), ("int8", 16)]]


def test_cached_tokens_and_a_rows_own_new_token_merge():
    rng = np.random.default_rng(7)
    (cache, runs), q = cache_of(PLAIN, MIXED, rng), queries(rng, SMALL)
    heads = (ROWS, SMALL.kv_heads)
    k, v = (rng.standard_normal((*heads, SMALL.head_dim), np.float32) for _ in "kv")
    logit = np.einsum("rhgd,rhd->rhg", q.reshape(*heads, GROUP, -1), k).reshape(ROWS, -1)
    own = PartialAttention(logit, np.ones_like(logit), np.repeat(v, GROUP, axis=1))
    merged = paged_attention(PLAIN, q, cache.arena, cache.plan(PLAIN, runs), 1).merge(own)
    for row in range(ROWS):
        cached = cache.of(row, 1)
        keys, values = (np.concatenate([old, new[row][:, None]], axis=1) for old, new in ((cached.k, k), (cached.v, v)))
        exact = exact_attention(q[row].reshape(1, SMALL.kv_heads, GROUP, -1), keys, values)
        assert relative_error(merged.output()[row], exact.output.reshape(q[row].shape)) < TOLERANCE
        expected = exact.log_sum_exp.reshape(-1)
        np.testing.assert_allclose(merged.log_sum_exp[row], expected, rtol=TOLERANCE, atol=TOLERANCE)


def test_attention_to_two_halves_of_the_segments_merges_to_attention_to_all():
    rng = np.random.default_rng(8)
    (cache, runs), q = cache_of(PLAIN, MIXED, rng), queries(rng, SMALL)
    parts = (cache.segments[::2], cache.segments[1::2], cache.segments)
    first, second, whole = (
        paged_attention(PLAIN, q, cache.arena, plan_attention(PLAIN, part, runs), 0) for part in parts
    )
    both = first.merge(second)
    assert relative_error(both.output(), np.asarray(whole.output(), np.float64)) < TOLERANCE
    np.testing.assert_allclose(both.log_sum_exp, whole.log_sum_exp, rtol=TOLERANCE, atol=TOLERANCE)
