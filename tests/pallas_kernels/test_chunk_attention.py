"""Prefill attention, chunks side by side, equals textbook attention of each token over what it may see."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import PAGES, SMALL, TOLERANCE, Cache, chunk_attention, exact_attention, relative_error

from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.pallas_kernels.xla.tiles import TileShape

GROUP = 3
SIZE = SMALL.page_size
SLOT_PAGES = 6
SLOTS = SLOT_PAGES * SIZE
SHAPE = TileShape(num_rows=SLOT_PAGES, max_pages=PAGES, rows=1, pages=4, num_formats=len(FORMATS), segments_per_row=2)


@st.composite
def chunk_batches(draw):
    """Chunks that share `SLOT_PAGES` pages of slots: (tokens, cached prefix), with unused pages behind the last."""
    chunks, room = [], SLOTS
    while room and len(chunks) < draw(st.integers(1, 3)):
        count = min(room, draw(st.one_of(st.sampled_from([1, SIZE, SIZE + 1]), st.integers(1, SLOTS))))
        names = draw(st.permutations(list(FORMATS)))[: draw(st.integers(0, 2))]
        prefix = [(name, draw(st.integers(0, PAGES)) * SIZE - draw(st.sampled_from([0, 0, 3]))) for name in names]
        chunks.append((count, [(name, max(0, num_tokens)) for name, num_tokens in prefix]))
        room -= -(-count // SIZE) * SIZE
    return chunks, draw(st.integers(0, 2**32 - 1))


def check(chunks: list[tuple[int, list[tuple[str, int]]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    cache = Cache(SMALL, rng)
    chunk_of_page, first = np.full(SLOT_PAGES, -1, np.int32), 0
    for chunk, (count, prefix) in enumerate(chunks):
        num_pages = -(-count // SIZE)
        chunk_of_page[first : first + num_pages] = chunk
        first += num_pages
        for name, num_tokens in prefix:
            cache.add(chunk, name, num_tokens)
    q = rng.standard_normal((SMALL.kv_heads, SLOTS, GROUP, SMALL.head_dim), np.float32) / SMALL.head_dim**0.5
    pages = (SMALL.kv_heads, SLOT_PAGES, SIZE, SMALL.head_dim)
    # The same tokens in two precisions may differ as much as they like here.
    own, earlier = ([rng.standard_normal(pages, np.float32) for _ in "kv"] for _ in range(2))
    tiles = cache.tiles(SHAPE)
    for layer in range(SMALL.num_layers):
        output = np.asarray(
            chunk_attention(q, own, earlier, chunk_of_page, cache.arena, tiles, layer, cache.formats, SMALL)
        )
        assert output.shape == q.shape
        assert np.isfinite(output).all()
        for chunk, (count, _) in enumerate(chunks):
            start = int(np.argmax(chunk_of_page == chunk)) * SIZE
            tokens = [start + i for i in {0, 1, SIZE - 1, SIZE, count // 2, count - 1} if i < count]
            expected = [_seen_by(slot, start, q, own, earlier, cache.of(chunk, layer)) for slot in tokens]
            error = relative_error(output[:, tokens], np.stack(expected, axis=1))
            assert error < TOLERANCE, (chunk, chunks[chunk])


def _seen_by(slot: int, start: int, q, own, earlier, cached) -> np.ndarray:
    """Attention of a slot to its chunk's cached tokens, its earlier pages, and its own page up to itself."""
    page = slot // SIZE
    parts = []
    for before, same_page, cached_part in zip(earlier, own, cached, strict=True):
        flat = before.reshape(SMALL.kv_heads, SLOTS, -1)
        parts.append([cached_part, flat[:, start : page * SIZE], same_page[:, page, : slot % SIZE + 1]])
    keys, values = (np.concatenate(part, axis=1) for part in parts)
    return exact_attention(q[:, slot], keys, values)


@settings(max_examples=20, deadline=None)
@given(chunk_batches())
def test_chunks_see_their_cached_prefix_and_themselves(batch):
    check(*batch)


def test_three_chunks_of_different_formats_with_partial_last_pages():
    check([(SIZE + 3, [("int4", 3 * SIZE)]), (1, [("int8", 5 * SIZE)]), (2 * SIZE, [("bf16", SIZE)])], seed=1)


def test_a_chunk_alone_fills_all_slots_and_has_no_prefix():
    check([(SLOTS, [])], seed=2)


def test_a_long_prefix_of_two_formats_takes_several_tiles():
    check([(5, [("int4", PAGES * SIZE), ("fp32", PAGES * SIZE)]), (SIZE, [])], seed=3)
