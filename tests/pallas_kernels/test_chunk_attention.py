"""Chunks side by side: attention among their own tokens, and merged with attention to their cached prefix."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_FORMATS,
    PAGES,
    SMALL,
    TOLERANCE,
    WITHIN,
    Cache,
    attend_within,
    exact_attention,
    paged_attention,
    relative_error,
)

from fineserve_jax.pallas_kernels import chunk_attention
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import QueryRun

GROUP = 3
SIZE = SMALL.page_size
SLOT_PAGES = 6
SLOTS = SLOT_PAGES * SIZE
NAMES = ("fp32", "bf16", "int8", "int4")
CACHED = AttentionSpec(
    SMALL,
    tuple(ALL_FORMATS[name] for name in NAMES),
    num_rows=SLOT_PAGES,
    num_queries=SLOTS,
    max_pages=PAGES,
    segments_per_row=2,
    implementation="xla",
)
attend_ahead = jax.jit(chunk_attention.attend_ahead, static_argnums=(5, 6))
Chunk = tuple[int, list[tuple[str, int]]]  # tokens; cached prefix: (format, tokens)


@st.composite
def chunk_batches(draw):
    """Chunks that share `SLOT_PAGES` pages of slots, with unused pages behind the last."""
    chunks, room = [], SLOTS
    while room and len(chunks) < draw(st.integers(1, 3)):
        count = min(room, draw(st.one_of(st.sampled_from([1, SIZE, SIZE + 1]), st.integers(1, SLOTS))))
        names = draw(st.lists(st.sampled_from(NAMES), max_size=2))
        prefix = [(name, draw(st.integers(0, PAGES)) * SIZE - draw(st.sampled_from([0, 0, 3]))) for name in names]
        chunks.append((count, [(name, max(0, num_tokens)) for name, num_tokens in prefix]))
        room -= -(-count // SIZE) * SIZE
    return chunks, draw(st.integers(0, 2**32 - 1))


class Batch:
    """Chunks with random tokens. The same tokens in two precisions may differ as much as they like here."""

    def __init__(self, chunks: list[Chunk], seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.chunks, self.cache = chunks, Cache(SMALL, self.rng, CACHED.formats)
        self.chunk_of_page, self.starts = np.full(SLOT_PAGES, -1, np.int32), []
        first = 0
        for chunk, (count, prefix) in enumerate(chunks):
            self.starts.append(first * SIZE)
            self.chunk_of_page[first : first + -(-count // SIZE)] = chunk
            first += -(-count // SIZE)
            for name, num_tokens in prefix:
                self.cache.add(chunk, name, num_tokens)
        shape = (SLOTS, SMALL.kv_heads, GROUP, SMALL.head_dim)
        self.q = self.rng.standard_normal(shape, np.float32) / np.float32(SMALL.head_dim**0.5)
        pages = (SMALL.kv_heads, SLOT_PAGES, SIZE, SMALL.head_dim)
        self.own, self.earlier = ([self.rng.standard_normal(pages, np.float32) for _ in "kv"] for _ in range(2))

    def within(self, by: str, window: int | None = None, soft_cap: float | None = None) -> PartialAttention:
        """f32[SLOTS, kv_heads, group], among the step's own tokens."""
        own, earlier = tuple(self.own), tuple(self.earlier)
        seen = attend_within[by](self.q, own, earlier, self.chunk_of_page, window=window, soft_cap=soft_cap)
        return PartialAttention(*map(np.asarray, seen))

    def to_cached(self, layer: int) -> PartialAttention:
        runs = [
            QueryRun(start, count, self.cache.next_position(chunk))
            for chunk, (start, (count, _)) in enumerate(zip(self.starts, self.chunks, strict=True))
        ]
        flat = self.q.reshape(SLOTS, -1, SMALL.head_dim)
        seen = paged_attention(CACHED, flat, self.cache.arena, self.cache.plan(CACHED, runs), layer)
        return PartialAttention(*(part.reshape(*self.q.shape[:3], *part.shape[2:]) for part in seen))

    def check(
        self,
        seen: PartialAttention,
        layer: int | None = None,
        window: int | None = None,
        soft_cap: float | None = None,
    ) -> None:
        """Against the oracle; with a layer, cached tokens are seen too."""
        output, log_sum_exp = np.asarray(seen.output()), np.asarray(seen.log_sum_exp)
        assert np.isfinite(output).all()
        for chunk, (start, (count, _)) in enumerate(zip(self.starts, self.chunks, strict=True)):
            for slot in {start + i for i in (0, 1, SIZE - 1, SIZE, count // 2, count - 1) if i < count}:
                parts = [part[:, -(window or part.shape[1]) :] for part in self._seen_by(slot, start, chunk, layer)]
                exact = exact_attention(self.q[slot][None], *parts, soft_cap=soft_cap)
                assert relative_error(output[slot], exact.output[0]) < TOLERANCE, (chunk, self.chunks[chunk])
                np.testing.assert_allclose(log_sum_exp[slot], exact.log_sum_exp[0], rtol=TOLERANCE, atol=TOLERANCE)

    def _seen_by(self, slot: int, start: int, chunk: int, layer: int | None) -> list[np.ndarray]:
        """Keys and values: the chunk's cached tokens, its earlier pages, and a slot's own page up to itself."""
        page, parts = slot // SIZE, []
        for i in (0, 1):
            earlier = self.earlier[i].reshape(SMALL.kv_heads, SLOTS, -1)[:, start : page * SIZE]
            seen = [earlier, self.own[i][:, page, : slot % SIZE + 1]]
            if layer is not None:
                seen.insert(0, self.cache.of(chunk, layer)[1 + i])
            parts.append(np.concatenate(seen, axis=1))
        return parts


def check_merged(chunks: list[Chunk], seed: int) -> None:
    batch = Batch(chunks, seed)
    for layer in range(SMALL.num_layers):
        for by in WITHIN:
            batch.check(batch.to_cached(layer).merge(batch.within(by)), layer)


@settings(max_examples=20)
@given(chunk_batches())
def test_a_token_sees_its_page_as_it_is_now_and_earlier_pages_of_its_chunk_as_they_will_be_kept(case):
    batch = Batch(*case)
    for by in WITHIN:
        batch.check(batch.within(by))


@pytest.mark.parametrize(("window", "soft_cap"), [(1, None), (3, 0.5), (SIZE, None), (SIZE + 5, 2.0)])
@settings(max_examples=8)
@given(chunk_batches())
def test_windows_and_soft_caps(window, soft_cap, case):
    batch = Batch(*case)
    for by in WITHIN:
        batch.check(batch.within(by, window, soft_cap), window=window, soft_cap=soft_cap)


@settings(max_examples=15)
@given(chunk_batches())
def test_merged_with_their_cached_prefix(case):
    check_merged(*case)


def test_three_chunks_of_different_formats_with_partial_last_pages():
    check_merged([(SIZE + 3, [("int4", 3 * SIZE)]), (1, [("int8", 5 * SIZE)]), (2 * SIZE, [("bf16", SIZE)])], seed=1)


def test_a_chunk_alone_fills_all_slots_and_has_no_prefix():
    check_merged([(SLOTS, [])], seed=2)


def test_a_long_prefix_of_two_formats_takes_several_tiles():
    check_merged([(5, [("int4", PAGES * SIZE), ("fp32", PAGES * SIZE)]), (SIZE, [])], seed=3)


def test_a_single_page_of_slots_has_no_earlier_pages():
    rng = np.random.default_rng(4)
    q = rng.standard_normal((SIZE, SMALL.kv_heads, GROUP, SMALL.head_dim), np.float32)
    pages = (SMALL.kv_heads, 1, SIZE, SMALL.head_dim)
    (k, v), nothing = (rng.standard_normal((2, *pages), np.float32), np.full((2, *pages), np.nan, np.float32))
    exact = functools.partial(exact_attention, k=k[:, 0], v=v[:, 0], visible=np.tri(SIZE, dtype=bool))
    for by in WITHIN:
        output = np.asarray(attend_within[by](q, (k, v), tuple(nothing), np.zeros(1, np.int32)).output())
        assert relative_error(output, exact(q).output) < TOLERANCE


@pytest.mark.parametrize("by", WITHIN)
@given(case=chunk_batches(), value=st.sampled_from([np.nan, np.inf, -np.inf]), part=st.integers(0, 1))
@settings(max_examples=20)
def test_what_is_not_finite_reaches_just_the_queries_that_see_it(by, case, value, part):
    """One slot's key or value, of a chunk or of a slot that no chunk uses."""
    chunks, seed = case
    batch = Batch(chunks, seed)
    clean = np.asarray(batch.within(by).output())
    bad = int(batch.rng.integers(SLOTS))
    for kept in (batch.own, batch.earlier):
        kept[part][:, bad // SIZE, bad % SIZE, 0] = value if part else np.nan
    found = np.asarray(batch.within(by).output())
    slots, pages = np.arange(SLOTS), np.arange(SLOTS) // SIZE
    sees = (pages == bad // SIZE) & (slots >= bad)
    sees |= (pages > bad // SIZE) & (batch.chunk_of_page[pages] == batch.chunk_of_page[bad // SIZE])
    used = batch.chunk_of_page[pages] >= 0  # what the others get matters to nobody
    assert not np.isfinite(found[sees & used]).all(axis=-1).any()
    np.testing.assert_array_equal(found[~sees], clean[~sees])


@settings(max_examples=20, deadline=None)
@given(
    sequences=st.lists(st.integers(-1, 2), min_size=8, max_size=8),
    begin=st.integers(0, 30),
    window=st.sampled_from([None, 2]),
    soft_cap=st.sampled_from([None, 3.0]),
)
def test_rows_of_a_sequence_see_those_ahead_of_them(sequences, begin, window, soft_cap):
    rng, rows = np.random.default_rng(begin), len(sequences)
    shape = (rows, SMALL.kv_heads, SMALL.head_dim)
    q = rng.standard_normal((rows, SMALL.kv_heads, GROUP, SMALL.head_dim), np.float32)
    k, v = (rng.standard_normal(shape, np.float32) for _ in "kv")
    positions = np.array([begin + sequences[:row].count(own) if own >= 0 else 0 for row, own in enumerate(sequences)])
    unused = np.array(sequences) < 0
    v[unused], k[unused] = np.nan, np.nan  # what pads a step is seen by nobody
    found = attend_ahead(q, k, v, np.array(sequences), positions, window, soft_cap)
    for row in np.flatnonzero(~unused):
        ahead = [
            other
            for other in range(rows)
            if sequences[other] == sequences[row] and 0 < positions[row] - positions[other] < (window or rows)
        ]
        logits = np.einsum("hgd,ohd->hgo", q[row].astype(np.float64), k[ahead])
        logits = logits if soft_cap is None else soft_cap * np.tanh(logits / soft_cap)
        weights = np.exp(logits)
        if not ahead:
            assert not np.asarray(found.l[row]).any()
            assert not np.asarray(found.acc[row]).any()
            continue
        expected = np.einsum("hgo,ohd->hgd", weights, v[ahead]) / weights.sum(axis=-1)[..., None]
        assert relative_error(found.output()[row], expected) < TOLERANCE


@settings(max_examples=15)
@given(st.integers(1, 2 * SIZE), st.lists(st.integers(1, SIZE), max_size=4), st.integers(0, 2**32 - 1))
def test_a_token_of_a_branch_sees_what_is_of_none_and_its_own(trunk, lengths, seed):
    """Of a chunk behind another one."""
    first = SIZE
    numbers = np.repeat(np.arange(len(lengths) + 1), [trunk, *lengths])[: SLOTS - first]
    branches = np.zeros(SLOTS, np.int32)
    branches[first : first + len(numbers)] = numbers
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((SLOTS, SMALL.kv_heads, GROUP, SMALL.head_dim), np.float32)
    kept = tuple(rng.standard_normal((SMALL.kv_heads, SLOT_PAGES, SIZE, SMALL.head_dim), np.float32) for _ in "kv")
    chunk_of_page = np.minimum(np.arange(SLOT_PAGES), 1)
    output = np.asarray(attend_within["xla"](q, kept, kept, chunk_of_page, branches=branches).output())
    k, v = (part.reshape(SMALL.kv_heads, SLOTS, -1) for part in kept)
    slots = np.arange(first, first + len(numbers))
    for slot in slots:
        seen = slots[(slots <= slot) & ((numbers == 0) | (numbers == branches[slot]))]
        exact = exact_attention(q[slot][None], k[:, seen], v[:, seen])
        assert relative_error(output[slot], exact.output[0]) < TOLERANCE


def test_branches_do_not_go_with_windows():
    batch = Batch([(SLOTS, [])], seed=5)
    with pytest.raises(ValueError, match="branches, and window=3"):
        chunk_attention.attend_within(
            batch.q, batch.own, batch.own, batch.chunk_of_page, 3, branches=np.zeros(SLOTS, np.int32)
        )
