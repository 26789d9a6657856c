"""The choice of a slab length, against a search that tries every length."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kv_cases import SMOLLM2_UNITS

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.slab_size import choose_slab_units

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=4)
bounds = st.sampled_from([0.01, 0.03, 0.1, 1.0])


def waste(slab_units: int, page_units) -> float:
    return max(slab_units % length for length in page_units) / slab_units


@given(page_units=lengths, num_units=st.integers(1, 40_000), max_waste=bounds)
def test_it_is_the_shortest_good_slab_or_else_the_best_affordable_one(page_units, num_units, max_waste):
    chosen = choose_slab_units(page_units, num_units, max_waste)
    affordable = range(max(page_units), num_units // (8 * len(page_units) + 1) + 1)
    good = next((units for units in affordable if waste(units, page_units) < max_waste), None)
    if not affordable:
        assert chosen == max(page_units)
    elif good is not None:
        assert chosen == good
    else:
        assert chosen in affordable
        assert waste(chosen, page_units) == min(waste(units, page_units) for units in affordable)


@given(page_units=lengths, max_waste=bounds)
def test_a_large_arena_always_gets_slabs_within_the_bound(page_units, max_waste):
    chosen = choose_slab_units(page_units, 2**31 - 1, max_waste)
    assert waste(chosen, page_units) < max_waste
    # No least common multiple: at most the longest page over the bound.
    assert chosen <= max(page_units) / max_waste + 1


@given(page_units=lengths, num_units=st.integers(1, 40_000))
def test_every_class_could_have_eight_slabs_beside_the_null_page(page_units, num_units):
    chosen = choose_slab_units(page_units, num_units)
    assert chosen == max(page_units) or num_units // chosen - 1 >= 8 * len(page_units)


@pytest.mark.parametrize("megabytes", [256, 1024, 65536])
def test_the_pages_of_smollm2_waste_under_one_percent(megabytes):
    num_units = megabytes * 2**20 // 256
    assert waste(choose_slab_units(SMOLLM2_UNITS, num_units), SMOLLM2_UNITS) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(([], 100), r"page_units=\[\]"), (([3, 0], 100), "at least 1"), (([3], 100, 0.0), "max_waste=0.0")],
)
def test_senseless_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        choose_slab_units(*arguments)
