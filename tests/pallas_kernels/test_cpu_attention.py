"""The compiled attention kernel equals textbook attention in float64 over what pages stand for, whichever of this
processor's instruction sets it uses."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LAYERS, Cache, Segment, check, page_layer
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ALL_FORMATS, TOLERANCE, attend_within, make_geometry, relative_error

from fineserve_jax.pallas_kernels import implementation
from fineserve_jax.pallas_kernels.cpu import library
from fineserve_jax.pallas_kernels.cpu.codecs import has_codec
from fineserve_jax.pallas_kernels.formats import FORMATS, KVFormat, get_format
from fineserve_jax.pallas_kernels.formats.int8 import Int8Codec
from fineserve_jax.pallas_kernels.operations import paged_attention, plan_attention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import QueryRun

needs_kernels = pytest.mark.skipif(library.why_unavailable() is not None, reason=str(library.why_unavailable()))
SETS = ("baseline",) if library.why_unavailable() else library.instruction_sets()
geometry = functools.partial(make_geometry, num_layers=LAYERS)


@pytest.fixture(params=SETS)
def instruction_set(request):
    """Compiled programs serve them all, so they are compiled once."""
    before = library.instruction_set()
    library.use_instruction_set(request.param)
    yield request.param
    library.use_instruction_set(before)


SMALL = geometry(kv_heads=2, head_dim=64)


def make_spec(*names: str, pages=SMALL, **options) -> AttentionSpec:
    chosen = tuple(map(get_format, names or FORMATS))
    defaults = {"num_rows": 6, "max_pages": 5, "segments_per_row": 2, "implementation": "cpu"}
    return AttentionSpec(pages, chosen, **defaults | options)


def decode_runs(*positions: int) -> list[QueryRun]:
    return [QueryRun(row, 1, position) for row, position in enumerate(positions)]


@st.composite
def batches(draw, spec: AttentionSpec):
    """Segments of every row, each behind the one before it, and each row's queries, behind those or among them."""
    size, most = spec.geometry.page_size, spec.max_pages * spec.geometry.page_size
    lengths = st.sampled_from([0, 1, size - 1, size, size + 1, most]) | st.integers(0, most)
    segments, runs, start = [], [], 0
    for row in range(spec.num_rows):
        position = 0
        for _ in range(draw(st.integers(0, spec.segments_per_row))):
            num_tokens = draw(lengths)
            segments.append(Segment(row, draw(st.sampled_from(spec.formats)).name, num_tokens, position))
            position += num_tokens
        if not spec.decodes:
            position = draw(st.just(position) | st.integers(0, position))
        most_queries = 1 if spec.decodes else spec.query_axis_size // spec.num_rows
        count = 1 if spec.decodes else draw(st.integers(0, most_queries))
        runs.append(QueryRun(start, count, position))
        start += most_queries
    return segments, runs, draw(st.integers(0, 2**32 - 1))


def check_drawn(spec: AttentionSpec, batch) -> None:
    segments, runs, seed = batch
    check(spec, 3, segments, runs, seed=seed)


DECODE = None if library.why_unavailable() else make_spec()
RAGGED = None if library.why_unavailable() else make_spec(num_rows=3, num_queries=96)


@needs_kernels
@settings(max_examples=3)
@given(data=st.data())
def test_decoding_rows_of_all_formats_in_one_batch(data):
    for name in SETS:
        library.use_instruction_set(name)
        check_drawn(DECODE, data.draw(batches(DECODE)))
    library.use_instruction_set(SETS[0])


@needs_kernels
@settings(max_examples=3)
@given(data=st.data())
def test_rows_of_all_formats_with_any_number_of_queries(data):
    for name in SETS:
        library.use_instruction_set(name)
        check_drawn(RAGGED, data.draw(batches(RAGGED)))
    library.use_instruction_set(SETS[0])


@needs_kernels
@settings(max_examples=2)
@given(data=st.data())
def test_with_a_window_and_a_soft_cap(data):
    """In blocks of 64 tokens that a window cuts anywhere."""
    for spec in (dataclasses.replace(part, window=70, soft_cap=1.5) for part in (DECODE, RAGGED)):
        for name in SETS:
            library.use_instruction_set(name)
            check_drawn(spec, data.draw(batches(spec)))
    library.use_instruction_set(SETS[0])


@needs_kernels
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "page_size", "group"),
    [(3, 96, 32, 1), (1, 256, 128, 2), (2, 40, 64, 4), (1, 24, 16, 5), (2, 80, 16, 7), (1, 8, 16, 9)],
)
def test_any_geometry(instruction_set, kv_heads, head_dim, page_size, group):
    """Heads that fill no whole registers, pages longer than a block of tokens, any number of query heads a KV head."""
    pages = geometry(kv_heads, head_dim, page_size)
    lengths = (page_size + 1, 2 * page_size, 3, page_size, 2 * page_size - 1, 2)
    rows = [
        (name, n // page_size * page_size if name == "int4" else n) for name, n in zip(FORMATS, lengths, strict=True)
    ]
    segments = [Segment(row, name, count) for row, (name, count) in enumerate(rows)]
    spec = make_spec(pages=pages, max_pages=2)
    check(spec, group, segments, decode_runs(*(count for _, count in rows)), seed=3)


@needs_kernels
@pytest.mark.parametrize(
    ("kv_heads", "head_dim", "page_size", "group", "window", "soft_cap"),
    [(1, 24, 4, 1, None, None), (3, 64, 16, 3, None, None), (2, 80, 128, 2, 70, 3.0), (1, 128, 32, 8, 5, None)],
)
def test_chunks_of_any_geometry(instruction_set, kv_heads, head_dim, page_size, group, window, soft_cap):
    """Among their own tokens, as XLA computes it: three chunks, of one page, of several, and no chunk's."""
    rng, of_page = np.random.default_rng(0), np.array([0, 1, 1, 1, -1], np.int32)
    q = rng.standard_normal((len(of_page) * page_size, kv_heads, group, head_dim), np.float32) / head_dim**0.5
    pages = (2, kv_heads, len(of_page), page_size, head_dim)
    own, earlier = (tuple(rng.standard_normal(pages, np.float32)) for _ in range(2))
    expected, found = (
        attend_within[by](q.astype(np.float32), own, earlier, of_page, window=window, soft_cap=soft_cap)
        for by in ("xla", "cpu")
    )
    of_chunk = np.repeat(of_page >= 0, page_size)
    ours, theirs = (np.asarray(partial.output()) for partial in (found, expected))
    assert relative_error(ours[of_chunk], theirs[of_chunk]) < TOLERANCE
    ours, theirs = (np.asarray(partial.log_sum_exp)[of_chunk] for partial in (found, expected))
    np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@needs_kernels
def test_rows_so_long_that_threads_share_them(instruction_set):
    spec = make_spec("bf16", "int8", "int4", num_rows=2, max_pages=70, window=1000, soft_cap=1.5)
    segments = [Segment(0, "int4", 1040), Segment(0, "bf16", 77, 1040), Segment(1, "int8", 1120)]
    check(spec, 1, segments, decode_runs(1117, 1120), seed=1)


@needs_kernels
def test_logits_so_large_that_exp_would_overflow(instruction_set):
    """And others so far below that it vanishes."""
    spec = make_spec("fp32", num_rows=1, max_pages=2)
    cache = Cache(spec, [Segment(0, "fp32", 32)], np.random.default_rng(0))
    tiles = plan_attention(spec, cache.segments, decode_runs(32))
    q = np.full((1, 2, 64), 200.0, np.float32)
    (_, k, v) = cache.of(0, 0, spec.geometry)
    logits = np.einsum("hd,htd->ht", q[0].astype(np.float64), k)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    expected = np.einsum("ht,htd->hd", weights / weights.sum(axis=1, keepdims=True), v)
    seen = jax.jit(paged_attention, static_argnums=0)(spec, q, cache.arena, tiles, 0)
    assert logits.max() > 1000
    np.testing.assert_allclose(seen.output()[0], expected, rtol=1e-3, atol=1e-3)  # of logits to 1e-7 of 3000


@needs_kernels
def test_a_row_gets_the_same_bits_whatever_is_beside_it(instruction_set):
    """And on however many threads: the order of sums depends on the row alone."""
    spec = make_spec("bf16", "int8", "int4", max_pages=40)
    lengths = [640, 17, 1, 300, 639, 64]
    segments = [Segment(row, "int8" if n % 16 else "int4", n) for row, n in enumerate(lengths)]
    segments.append(Segment(0, "bf16", 5, 640))
    cache = Cache(spec, segments, np.random.default_rng(0))
    q = np.random.default_rng(1).standard_normal((6, 6, 64), np.float32)
    attend = jax.jit(paged_attention, static_argnums=0)
    runs = decode_runs(645, *lengths[1:])
    together = attend(spec, q, cache.arena, plan_attention(spec, cache.segments, runs), 1)
    for row in range(6):
        own = [segment for segment in cache.segments if segment.row == row]
        alone = attend(spec, q, cache.arena, plan_attention(spec, own, runs), 1)
        for one, other in zip(together, alone, strict=True):
            np.testing.assert_array_equal(one[row], other[row])


@needs_kernels
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_not_finite_reach_those_who_see_them(instruction_set, value):
    """All of the row's queries, and no other row's."""
    spec = make_spec("fp32", num_rows=2, num_queries=64, max_pages=2)
    cache = Cache(spec, [Segment(0, "fp32", 32), Segment(1, "fp32", 32)], np.random.default_rng(0))
    k, v = (np.ones((LAYERS, 2, 1, 16, 64), np.float32) for _ in "kv")
    v[:, :, :, 5] = value
    words = FORMATS["fp32"].encode_vectors(jnp.asarray(k), jnp.asarray(v))
    own = jax.tree.map(lambda part: np.asarray(part[0, :, 0]), words)
    (segment,) = (segment for segment in cache.segments if segment.row == 0)
    flat = page_layer(FORMATS["fp32"], spec.geometry, own, 16).reshape(-1, *spec.geometry.unit_shape)
    cache.arena[segment.pages[0] : segment.pages[0] + len(flat)] = flat
    runs = [QueryRun(0, 20, 32), QueryRun(20, 20, 32)]
    q = np.ones((64, 4, 64), np.float32)
    tiles = plan_attention(spec, cache.segments, runs)
    output = np.asarray(jax.jit(paged_attention, static_argnums=0)(spec, q, cache.arena, tiles, 0).output())
    assert not np.isfinite(output[:20]).any()
    assert np.isfinite(output[20:]).all()


@needs_kernels
def test_every_format_of_the_package_has_one():
    assert all(map(has_codec, FORMATS.values()))


@needs_kernels
def test_formats_without_one_are_left_to_xla():
    """Beside others in one row, and a format that inherits from one that has one."""

    class Own(Int8Codec):
        name = "own"

        def to_codes(self, values):
            return super().to_codes(values) // 2 * 2

    assert not has_codec(KVFormat(Own(), Own()))
    assert not has_codec(KVFormat(Int8Codec(), Own()))
    formats = (get_format("bf16"), ALL_FORMATS["int2"], get_format("int4"))
    spec = dataclasses.replace(make_spec("bf16"), formats=formats)
    segments = [Segment(0, "int2", 33), Segment(0, "bf16", 20, 33), Segment(1, "int4", 80), Segment(2, "int2", 5)]
    check(spec, 2, segments, decode_runs(53, 80, 5, 0, 0, 0), seed=2)
    check(dataclasses.replace(spec, formats=formats[1:2]), 2, [Segment(0, "int2", 33)], decode_runs(33, 0, 0, 0, 0, 0))


@needs_kernels
def test_an_instruction_set_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"instruction set='mmx' is none that this processor.*baseline"):
        library.use_instruction_set("mmx")
    program = (
        "from fineserve_jax.pallas_kernels.cpu import library as l; l.why_unavailable(); print(l.instruction_set())"
    )
    command = [sys.executable, "-c", program]
    for name, shown in (("baseline", "baseline\n"), ("mmx", "")):
        done = subprocess.run(command, env={**os.environ, library.VARIABLE: name}, capture_output=True, text=True)
        assert done.stdout == shown
    assert "FINESERVE_CPU_ISA='mmx' is none that this processor has kernels for" in done.stderr


def test_where_they_were_not_built_xla_is_used_and_asking_for_them_is_refused(monkeypatch):
    monkeypatch.setattr(library, "why_unavailable", lambda: "they were not built")
    monkeypatch.delenv(implementation.VARIABLE, raising=False)
    assert implementation.default_implementation() == "xla"
    monkeypatch.setenv(implementation.VARIABLE, "cpu")
    with pytest.raises(ValueError, match="FINESERVE_ATTENTION='cpu' cannot be used: they were not built, or use 'xla'"):
        implementation.default_implementation()


@needs_kernels
def test_they_are_the_default_on_cpus(monkeypatch):
    monkeypatch.delenv(implementation.VARIABLE, raising=False)
    assert implementation.default_implementation() == "cpu"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv(implementation.VARIABLE, "cpu")
    with pytest.raises(ValueError, match="'cpu' runs on CPUs, and JAX's platform is gpu"):
        implementation.default_implementation()
