"""Changing pages from one format to another, on the device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    ALL_FORMATS,
    NAN_WORD,
    PAGES,
    SMALL,
    SMALL_TPU,
    gather,
    geometry_id,
    page_shape,
    requantize,
    store,
    write_pages,
)

CASES = [
    ("bf16", "int4", SMALL),
    ("bf16", "int4", SMALL_TPU),
    ("fp32", "int8", SMALL),
    ("int8", "fp8", SMALL),
    ("int4", "int8", SMALL_TPU),
    ("int4", "bf16", SMALL),
    ("int4", "int2", SMALL),
]
every_case = pytest.mark.parametrize(
    ("source", "target", "geometry"), CASES, ids=[f"{a}-{b}-{geometry_id(geometry)}" for a, b, geometry in CASES]
)
both_arenas = pytest.mark.parametrize("geometry", [SMALL, SMALL_TPU], ids=geometry_id)


def arena_of(kv_format, geometry, seed: int):
    """Eight pages in random places of an arena of NaN, places for as many others, and what they stand for."""
    rng = np.random.default_rng(seed)
    stored = store(kv_format, *(rng.standard_normal(page_shape(geometry), np.float32) for _ in "kv"))
    longest = ALL_FORMATS["fp32"].page_units(geometry)
    places = (1 + rng.permutation(2 * PAGES)).astype(np.int32) * longest
    arena = jnp.full(((2 * PAGES + 1) * longest, *geometry.unit_shape), NAN_WORD, jnp.uint16)
    return write_pages(arena, stored.words, places[:PAGES], kv_format, geometry), *np.split(places, 2), stored


@every_case
def test_target_pages_hold_the_encoding_of_what_the_source_pages_stand_for(source, target, geometry):
    source, target = ALL_FORMATS[source], ALL_FORMATS[target]
    arena, sources, targets, stored = arena_of(source, geometry, seed=1)
    after = requantize(arena, sources, targets, PAGES, source, target, geometry)
    expected = store(target, stored.k, stored.v)
    found = gather(after, targets, target, geometry)
    jax.tree.map(np.testing.assert_array_equal, found, expected.words)


@pytest.mark.parametrize("count", [0, 1, 3, 4, 5, 8])
@both_arenas
def test_only_the_first_count_pages_are_written(geometry, count):
    source, target = ALL_FORMATS["bf16"], ALL_FORMATS["int4"]
    arena, sources, targets, _ = arena_of(source, geometry, seed=2)
    before = np.array(arena)
    after = np.array(requantize(arena, sources, targets, count, source, target, geometry))
    written = np.zeros(len(before), bool)
    for page in targets[:count]:
        written[page : page + target.page_units(geometry)] = True
    np.testing.assert_array_equal(after[~written], before[~written])
    for page in targets[:count]:
        layers = after[page : page + target.page_units(geometry)].reshape(geometry.num_layers, -1)
        assert (layers[:, : target.words_per_layer(geometry)] != NAN_WORD).mean() > 0.99
