"""Writing the arena changes exactly the words it should, and reading gives them back bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_FORMATS,
    FAR_AWAY,
    GEOMETRIES,
    PAGE_FORMATS,
    PAGES,
    SMALL,
    SMALL_TPU,
    TOKEN_FORMATS,
    encode_and_write_pages,
    encode_and_write_tokens,
    every_format,
    every_page_format,
    every_token_format,
    gather,
    geometry_id,
    page_shape,
    store,
    write_pages,
    write_tokens,
)

ARENA_WORDS = 12288 * 128
some_geometries = pytest.mark.parametrize("geometry", [*GEOMETRIES[:2], SMALL_TPU], ids=geometry_id)
# All but the slowest to compile.
every_written_format = pytest.mark.parametrize(
    ("kv_format", "geometry"),
    [
        pytest.param(kv_format, geometry, id=f"{geometry_id(geometry)}-{name}")
        for geometry in (*GEOMETRIES[:2], SMALL_TPU)
        for name, kv_format in ALL_FORMATS.items()
        if (name, geometry) != ("int2", GEOMETRIES[1])
    ],
)
both_arenas = pytest.mark.parametrize("geometry", [SMALL, SMALL_TPU], ids=geometry_id)


def num_units(geometry) -> int:
    return ARENA_WORDS // geometry.unit_words


def vectors(geometry, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(page_shape(geometry), np.float32) for _ in "kv"]


def token_vectors(geometry, seed: int) -> list[np.ndarray]:
    """One token for each of `PAGES` rows: f32[layers, kv_heads, PAGES, head_dim]."""
    return [part[:, :, :, 0] for part in vectors(geometry, seed)]


def one_token_words(kv_format, k, v):
    """As tokens are encoded: each as a page of its own."""
    return store(kv_format, k[:, :, :, None], v[:, :, :, None]).words


def noise(geometry, seed: int = 7) -> np.ndarray:
    """An arena of any bits."""
    shape = (num_units(geometry), *geometry.unit_shape)
    return np.random.default_rng(seed).integers(0, 2**16, shape, np.uint16)


def inside(pages, kv_format, geometry) -> np.ndarray:
    """Which units belong to the pages."""
    taken = np.zeros(num_units(geometry), bool)
    for page in pages:
        taken[page : page + kv_format.page_units(geometry)] = page < len(taken)
    return taken


def assert_same_words(result, expected) -> None:
    assert jax.tree.structure(result) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, result, expected)


def select(words, pages) -> list[np.ndarray]:
    return [np.asarray(part)[:, :, pages] for part in jax.tree.leaves(words)]


@every_written_format
def test_pages_are_read_as_they_were_written_and_the_rest_of_the_arena_is_untouched(kv_format, geometry):
    stored = store(kv_format, *vectors(geometry, seed=1))
    before, length = noise(geometry), kv_format.page_units(geometry)
    pages = [num_units(geometry) - length, *range(1, 7 * length, length)]  # the arena's last units, and some that touch
    after = write_pages(before, stored.words, pages, kv_format, geometry)
    assert_same_words(gather(after, pages, kv_format, geometry), stored.words)
    untouched = ~inside(pages, kv_format, geometry)
    np.testing.assert_array_equal(np.asarray(after)[untouched], before[untouched])


@every_token_format
@some_geometries
def test_a_page_lies_as_its_picture_says(kv_format, geometry):
    """K head after head, V, then each scale array head after head: the words of one page, written out by hand."""
    stored, page = store(kv_format, *vectors(geometry, seed=5)), 3
    arena = write_pages(noise(geometry), stored.words, page + np.arange(PAGES) * 99999, kv_format, geometry)
    per_layer = kv_format.units_per_layer(geometry)
    for layer in range(geometry.num_layers):
        start = page + layer * per_layer
        found = np.asarray(arena[start : start + per_layer]).reshape(-1)
        values = [np.concatenate([word[layer, :, 0] for word in side.words], axis=-1) for side in stored.words]
        scales = [*stored.words.k.scales, *stored.words.v.scales]
        parts: list[np.ndarray] = [*values, *(part[layer, :, 0] for part in scales)]
        content = np.concatenate([part.reshape(-1) for part in parts])
        assert len(content) == kv_format.words_per_layer(geometry)
        np.testing.assert_array_equal(found[: len(content)], content)
        sizes = [size for codec in kv_format.sides for size in codec.scale_sizes(geometry)]
        starts = [start for side in kv_format.scale_starts(geometry) for start in side]
        for part, size, start in zip(scales, sizes, starts, strict=True):
            np.testing.assert_array_equal(found[start : start + size], part[layer, 0, 0].reshape(-1))


@every_token_format
@some_geometries
def test_a_page_written_token_by_token_is_the_page_written_at_once(kv_format, geometry):
    """Several pages side by side, each in an order of its own."""
    k, v = vectors(geometry, seed=2)
    length = kv_format.page_units(geometry)
    pages = 2 * length * np.random.default_rng(4).permutation(PAGES)
    arena = jnp.zeros((num_units(geometry), *geometry.unit_shape), jnp.uint16)
    at_once = write_pages(arena, store(kv_format, k, v).words, pages, kv_format, geometry)
    rng = np.random.default_rng(3)
    orders = np.stack([rng.permutation(geometry.page_size) for _ in range(PAGES)])
    for offsets in orders.T:
        words = one_token_words(kv_format, *(part[:, :, np.arange(PAGES), offsets] for part in (k, v)))
        arena = write_tokens(arena, words, pages, offsets, kv_format, geometry)
    np.testing.assert_array_equal(arena, at_once)


@every_token_format
def test_tokens_of_one_page_may_be_written_together(kv_format):
    geometry = GEOMETRIES[0]
    k, v = vectors(geometry, seed=2)
    arena = jnp.zeros((num_units(geometry), *geometry.unit_shape), jnp.uint16)
    at_once = write_pages(arena, store(kv_format, k[:, :, :1], v[:, :, :1]).words, [0], kv_format, geometry)
    offsets = np.random.default_rng(3).permutation(geometry.page_size)
    words = one_token_words(kv_format, *(part[:, :, 0, offsets] for part in (k, v)))
    together = write_tokens(arena, words, [0] * geometry.page_size, offsets, kv_format, geometry)
    np.testing.assert_array_equal(together, at_once)


@every_token_format
@both_arenas
@settings(max_examples=10)
@given(data=st.data())
def test_writing_tokens_changes_those_tokens_only(kv_format, geometry, data):
    """Rows may be dropped, and which are written does not depend on their order."""
    length, units = kv_format.page_units(geometry), num_units(geometry)
    page = st.sampled_from([*range(0, units - length, length)])
    dropped = st.sampled_from([units, units + 1, FAR_AWAY])
    pages = data.draw(st.lists(page, min_size=PAGES, max_size=PAGES, unique=True))
    targets = [data.draw(st.one_of(st.just(page), dropped)) for page in pages]
    offsets = data.draw(st.lists(st.integers(0, geometry.page_size - 1), min_size=PAGES, max_size=PAGES))
    words = one_token_words(kv_format, *token_vectors(geometry, data.draw(st.integers(0, 9))))

    before = noise(geometry)
    expected = jax.tree.map(np.array, gather(before, pages, kv_format, geometry))
    for part, new in zip(jax.tree.leaves(expected), jax.tree.leaves(words), strict=True):
        for i, (target, offset) in enumerate(zip(targets, offsets, strict=True)):
            if target < units:
                part[:, :, i, offset] = new[:, :, i, 0]
    after = write_tokens(before, words, targets, offsets, kv_format, geometry)
    assert_same_words(gather(after, pages, kv_format, geometry), expected)
    untouched = ~inside(targets, kv_format, geometry)
    np.testing.assert_array_equal(np.asarray(after)[untouched], before[untouched])


@every_format
@pytest.mark.parametrize("past_the_end", [num_units(SMALL), num_units(SMALL) + 1, FAR_AWAY])
def test_pages_past_the_arena_are_dropped(kv_format, past_the_end):
    words = store(kv_format, *vectors(SMALL, seed=4)).words
    before, page = noise(SMALL), 2 * kv_format.page_units(SMALL)
    targets = [past_the_end] * PAGES
    targets[3] = page
    after = write_pages(before, words, targets, kv_format, SMALL)
    kept = inside([page], kv_format, SMALL)
    np.testing.assert_array_equal(np.asarray(after)[~kept], before[~kept])
    read = gather(after, [page] * PAGES, kv_format, SMALL)
    assert_same_words(select(read, 0), select(words, 3))


# -- encode and write --------------------------------------------------------------------------------------

TOKEN_WISE, EVERY = tuple(TOKEN_FORMATS.values()), tuple(ALL_FORMATS.values())


def distinct_pages(geometry, rng) -> np.ndarray:
    """Of any format, none of which overlap."""
    longest = ALL_FORMATS["fp32"].page_units(geometry)
    return rng.permutation(num_units(geometry) // longest)[:PAGES].astype(np.int32) * longest


@settings(max_examples=10)
@given(data=st.data())
def test_tokens_of_many_formats_are_each_encoded_in_its_own_and_written(data):
    """Some nowhere; a format id that there is not is nowhere too."""
    geometry = SMALL
    ids = data.draw(st.lists(st.integers(0, len(TOKEN_WISE)), min_size=PAGES, max_size=PAGES))
    offsets = data.draw(st.lists(st.integers(0, geometry.page_size - 1), min_size=PAGES, max_size=PAGES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    pages = np.where(rng.random(PAGES) < 0.2, FAR_AWAY, distinct_pages(geometry, rng))
    k, v = token_vectors(geometry, data.draw(st.integers(0, 9)))
    expected = before = noise(geometry)
    for row, format_id in enumerate(ids):
        if format_id < len(TOKEN_WISE):
            own, kv_format = np.where(np.arange(PAGES) == row, pages, FAR_AWAY), TOKEN_WISE[format_id]
            expected = write_tokens(expected, one_token_words(kv_format, k, v), own, offsets, kv_format, geometry)
    after = encode_and_write_tokens(before, k, v, pages, offsets, ids, TOKEN_WISE, geometry)
    np.testing.assert_array_equal(after, expected)


def test_pages_of_many_formats_are_each_encoded_in_its_own_and_written():
    geometry = SMALL_TPU
    ids, rng = [*range(len(EVERY)), 2][:PAGES], np.random.default_rng(6)
    pages = distinct_pages(geometry, rng)
    pages[1] = FAR_AWAY
    k, v = vectors(geometry, seed=6)
    expected = before = noise(geometry)
    for row, format_id in enumerate(ids):
        own, kv_format = np.where(np.arange(PAGES) == row, pages, FAR_AWAY), EVERY[format_id]
        expected = write_pages(expected, store(kv_format, k, v).words, own, kv_format, geometry)
    after = encode_and_write_pages(before, k, v, pages, ids, EVERY, geometry)
    np.testing.assert_array_equal(after, expected)


def test_vectors_in_bf16_are_written_as_the_numbers_they_are():
    formats, rng = (ALL_FORMATS["fp32"],), np.random.default_rng(8)
    pages, ids, before = distinct_pages(SMALL, rng), [0] * PAGES, noise(SMALL)
    offsets = rng.integers(0, SMALL.page_size, PAGES)
    narrow = [jnp.asarray(part, jnp.bfloat16) for part in token_vectors(SMALL, seed=8)]
    wide = [part.astype(jnp.float32) for part in narrow]
    results = [encode_and_write_tokens(before, *part, pages, offsets, ids, formats, SMALL) for part in (narrow, wide)]
    np.testing.assert_array_equal(*results)


@every_page_format
def test_writing_tokens_in_a_page_wise_format_is_refused(kv_format):
    k, v = token_vectors(SMALL, seed=9)
    places = [np.zeros(PAGES, np.int32)] * 3
    message = (
        f"{kv_format.name} encodes whole pages; write new tokens in {kv_format.residual}.*write_pages or requantize"
    )
    with pytest.raises(ValueError, match=message):
        encode_and_write_tokens(noise(SMALL), k, v, *places, (ALL_FORMATS["bf16"], kv_format), SMALL)


def test_every_page_wise_format_was_tried():
    assert {"int4", "int2"} <= set(PAGE_FORMATS)
