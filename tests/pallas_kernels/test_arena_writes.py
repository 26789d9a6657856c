"""Writing the arena changes exactly the words it should, and reading gives them back bit for bit."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    FAR_AWAY,
    GEOMETRIES,
    PAGES,
    SMALL,
    every_format,
    every_token_format,
    gather,
    make_geometry,
    page_shape,
    store,
    write_pages,
    write_tokens,
)

NUM_UNITS = 12288
two_geometries = pytest.mark.parametrize("geometry", GEOMETRIES[:2], ids=["2x64x16", "3x96x32"])


def vectors(geometry, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(page_shape(geometry), np.float32) for _ in "kv"]


def noise(geometry, seed: int = 7) -> np.ndarray:
    """An arena of any bits."""
    return np.random.default_rng(seed).integers(0, 2**16, (NUM_UNITS, geometry.unit_words), np.uint16)


def inside(pages, kv_format, geometry) -> np.ndarray:
    """Which units belong to the pages."""
    taken = np.zeros(NUM_UNITS, bool)
    for page in pages:
        taken[page : page + kv_format.page_units(geometry)] = page < NUM_UNITS
    return taken


def assert_same_words(result, expected) -> None:
    for one, other in zip(result, expected, strict=True):
        np.testing.assert_array_equal(one, other)


@every_format
@two_geometries
def test_pages_are_read_as_they_were_written_and_the_rest_of_the_arena_is_untouched(kv_format, geometry):
    stored = store(kv_format, geometry, *vectors(geometry, seed=1))
    before, length = noise(geometry), kv_format.page_units(geometry)
    pages = [NUM_UNITS - length, *range(1, 7 * length, length)]  # the arena's last units, and some that touch
    after = write_pages(before, stored.words, pages, kv_format, geometry)
    assert_same_words(gather(after, pages, kv_format, geometry), stored.words)
    untouched = ~inside(pages, kv_format, geometry)
    np.testing.assert_array_equal(np.asarray(after)[untouched], before[untouched])


@every_token_format
@two_geometries
def test_a_page_written_token_by_token_is_the_page_written_at_once(kv_format, geometry):
    """Several pages side by side, each in an order of its own."""
    k, v = vectors(geometry, seed=2)
    length = kv_format.page_units(geometry)
    pages = 2 * length * np.random.default_rng(4).permutation(PAGES)
    arena = jnp.zeros((NUM_UNITS, geometry.unit_words), jnp.uint16)
    at_once = write_pages(arena, store(kv_format, geometry, k, v).words, pages, kv_format, geometry)
    rng = np.random.default_rng(3)
    orders = np.stack([rng.permutation(geometry.page_size) for _ in range(PAGES)])
    # As the runner encodes them: each token as a page of its own.
    one_token = make_geometry(geometry.kv_heads, geometry.head_dim, page_size=1, num_layers=geometry.num_layers)
    for offsets in orders.T:
        token = [part[:, :, np.arange(PAGES), offsets][:, :, :, None] for part in (k, v)]
        words = store(kv_format, one_token, *token).words
        arena = write_tokens(arena, words, pages, offsets, kv_format, geometry)
    np.testing.assert_array_equal(arena, at_once)


@every_token_format
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_writing_tokens_changes_those_tokens_only(kv_format, data):
    """Rows may be dropped, and which are written does not depend on their order."""
    one_token = make_geometry(SMALL.kv_heads, SMALL.head_dim, page_size=1)
    length = kv_format.page_units(SMALL)
    page = st.sampled_from([*range(0, NUM_UNITS - length, length)])
    dropped = st.sampled_from([NUM_UNITS, NUM_UNITS + 1, FAR_AWAY])
    pages = data.draw(st.lists(page, min_size=PAGES, max_size=PAGES, unique=True))
    targets = [data.draw(st.one_of(st.just(page), dropped)) for page in pages]
    offsets = data.draw(st.lists(st.integers(0, SMALL.page_size - 1), min_size=PAGES, max_size=PAGES))
    stored = store(kv_format, one_token, *vectors(one_token, data.draw(st.integers(0, 9))))

    before = noise(SMALL)
    expected = [np.array(part) for part in gather(before, pages, kv_format, SMALL)]
    planes = (SMALL.num_layers, PAGES, kv_format.aux_planes, SMALL.kv_heads)
    aux, token_aux = expected[2].reshape(*planes, SMALL.page_size), stored.words.aux.reshape(planes)
    for i, (target, offset) in enumerate(zip(targets, offsets, strict=True)):
        if target < NUM_UNITS:
            expected[0][:, :, i, offset] = stored.words.k[:, :, i, 0]
            expected[1][:, :, i, offset] = stored.words.v[:, :, i, 0]
            aux[:, i, ..., offset] = token_aux[:, i]
    after = write_tokens(before, stored.words, targets, offsets, kv_format, SMALL)
    expected[2] = aux.reshape(expected[2].shape)
    assert_same_words(gather(after, pages, kv_format, SMALL), expected)
    untouched = ~inside(targets, kv_format, SMALL)
    np.testing.assert_array_equal(np.asarray(after)[untouched], before[untouched])


@every_format
@pytest.mark.parametrize("past_the_end", [NUM_UNITS, NUM_UNITS + 1, FAR_AWAY])
def test_pages_past_the_arena_are_dropped(kv_format, past_the_end):
    words = store(kv_format, SMALL, *vectors(SMALL, seed=4)).words
    before, page = noise(SMALL), 2 * kv_format.page_units(SMALL)
    targets = [past_the_end] * PAGES
    targets[3] = page
    after = write_pages(before, words, targets, kv_format, SMALL)
    kept = inside([page], kv_format, SMALL)
    np.testing.assert_array_equal(np.asarray(after)[~kept], before[~kept])
    one = (words.k[:, :, 3], words.v[:, :, 3], words.aux[:, 3])
    read = gather(after, [page] * PAGES, kv_format, SMALL)
    assert_same_words((read.k[:, :, 0], read.v[:, :, 0], read.aux[:, 0]), one)
