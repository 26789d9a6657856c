"""Changing pages from one format to another, on the device."""

import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import NAN_WORD, PAGES, SMALL, gather, page_shape, requantise, store, write_pages

from fineserve_jax.pallas_kernels.formats import get_format

NUM_UNITS = 4096
PAIRS = [
    ("bf16", "int4"),
    ("fp32", "int8"),
    ("int8", "int4"),
    ("int4", "int8"),
    ("int4", "bf16"),
]
every_pair = pytest.mark.parametrize(("source", "target"), PAIRS, ids=lambda name: name)


def arena_of(kv_format, seed: int):
    """Eight pages in random places of an arena of NaN, places for as many others, and what they stand for."""
    rng = np.random.default_rng(seed)
    stored = store(kv_format, SMALL, *(rng.standard_normal(page_shape(SMALL), np.float32) for _ in "kv"))
    longest = get_format("fp32").page_units(SMALL)
    places = (1 + rng.permutation(2 * PAGES)).astype(np.int32) * longest
    arena = jnp.full((NUM_UNITS, SMALL.unit_words), NAN_WORD, jnp.uint16)
    return write_pages(arena, stored.words, places[:PAGES], kv_format, SMALL), *np.split(places, 2), stored


@every_pair
def test_target_pages_hold_the_encoding_of_what_the_source_pages_stand_for(source, target):
    source, target = get_format(source), get_format(target)
    arena, sources, targets, stored = arena_of(source, seed=1)
    after = requantise(arena, sources, targets, PAGES, source, target, SMALL)
    expected = store(target, SMALL, stored.k, stored.v)
    for result, wanted in zip(gather(after, targets, target, SMALL), expected.words, strict=True):
        np.testing.assert_array_equal(result, wanted)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8])
def test_only_the_first_count_pages_are_written(count):
    source, target = get_format("bf16"), get_format("int4")
    arena, sources, targets, _ = arena_of(source, seed=2)
    before = np.array(arena)
    after = np.array(requantise(arena, sources, targets, count, source, target, SMALL))
    written = np.zeros(NUM_UNITS, bool)
    for page in targets[:count]:
        written[page : page + target.page_units(SMALL)] = True
    np.testing.assert_array_equal(after[~written], before[~written])
    for page in targets[:count]:
        layers = after[page : page + target.page_units(SMALL)].reshape(SMALL.num_layers, -1)
        assert (layers[:, : target.words_per_layer(SMALL)] != NAN_WORD).mean() > 0.99
