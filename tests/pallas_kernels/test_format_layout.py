"""How pages lie in the arena, and what a cached value costs."""

import functools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import every_format, every_geometry, make_geometry

from fineserve_jax.pallas_kernels.formats import FORMATS, TokenFormat, get_format, register
from fineserve_jax.pallas_kernels.formats.packing import (
    bf16_to_words,
    pack_planar,
    unpack_signed,
    unpack_unsigned,
    words_to_f32,
)
from fineserve_jax.pallas_kernels.geometry import MAX_UNIT_WORDS, choose_unit_words

ANY_GEOMETRY = st.builds(
    make_geometry,
    kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from([32, 64, 80, 96, 128, 192, 256]),
    page_size=st.sampled_from([4, 8, 16, 32, 64]),
    num_layers=st.integers(1, 40),
)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_a_page_is_its_layers_in_whole_units_and_a_heads_block_is_too(kv_format, geometry):
    block = geometry.page_size * kv_format.vector_words(geometry)
    assert block * 16 == geometry.page_size * geometry.head_dim * kv_format.value_bits
    assert block % geometry.unit_words == 0
    content = 2 * geometry.kv_heads * block + kv_format.aux_words(geometry)
    assert kv_format.words_per_layer(geometry) == content
    assert kv_format.units_per_layer(geometry) == math.ceil(content / geometry.unit_words)
    assert kv_format.page_units(geometry) == geometry.num_layers * kv_format.units_per_layer(geometry)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_bits_per_value_count_scales_and_padding(kv_format, geometry):
    values = 2 * geometry.num_layers * geometry.kv_heads * geometry.page_size * geometry.head_dim
    page_bits = 16 * kv_format.page_units(geometry) * geometry.unit_words
    assert kv_format.bits_per_value(geometry) == pytest.approx(page_bits / values)
    assert kv_format.bits_per_value(geometry) >= kv_format.value_bits


@pytest.mark.parametrize(
    ("name", "most"), [("fp32", 32.0), ("bf16", 16.0), ("fp16", 16.0), ("int8", 8.34), ("int4", 4.75)]
)
@pytest.mark.parametrize("kv_heads", [3, 8])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scales_and_padding_cost_little(name, most, kv_heads, head_dim):
    assert get_format(name).bits_per_value(make_geometry(kv_heads, head_dim)) <= most


@given(head_dim=st.integers(1, 64).map(lambda n: 8 * n), page_size=st.integers(1, 8).map(lambda n: 4 * n))
def test_a_unit_is_the_longest_power_of_two_that_divides_the_narrowest_block(head_dim, page_size):
    unit, block = choose_unit_words(head_dim, page_size), page_size * head_dim * 4 // 16
    assert unit & (unit - 1) == 0
    assert block % unit == 0
    assert unit == MAX_UNIT_WORDS or block % (2 * unit)


@every_format
@every_geometry
def test_encode_gives_the_words_that_the_layout_has_room_for(kv_format, geometry):
    pages = (geometry.kv_heads, 2, geometry.page_size)
    vector = jax.ShapeDtypeStruct((*pages, geometry.head_dim), np.float32)
    words = jax.eval_shape(functools.partial(kv_format.encode, geometry), vector, vector)
    vectors = (*pages, kv_format.vector_words(geometry))
    assert (words.k.shape, words.v.shape) == (vectors, vectors)
    assert words.aux.shape == (2, kv_format.aux_words(geometry))
    assert {part.dtype for part in words} == {np.dtype(np.uint16)}


# -- words -------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**32 - 1))
def test_packing_is_planar_and_both_readings_undo_it(bits, seed):
    """Word w holds the values w, w + D/n, w + 2D/n ... in its bits from the lowest up."""
    planes, largest = 16 // bits, 2**bits
    values = np.random.default_rng(seed).integers(0, largest, (3, 64))
    words = np.asarray(pack_planar(values, bits))
    by_hand = sum(part << (bits * i) for i, part in enumerate(np.split(values, planes, axis=-1)))
    np.testing.assert_array_equal(words, by_hand)
    np.testing.assert_array_equal(np.concatenate(unpack_unsigned(words, bits), axis=-1), values)
    signed = np.where(values >= largest // 2, values - largest, values)
    np.testing.assert_array_equal(np.concatenate(unpack_signed(words, bits), axis=-1), signed)
    np.testing.assert_array_equal(pack_planar(signed, bits), words)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=4, max_size=4))
def test_bf16_words_are_the_upper_halves_of_the_nearest_floats(values):
    values = np.array(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    words = np.asarray(bf16_to_words(values))
    np.testing.assert_array_equal(words, nearest_even)
    np.testing.assert_array_equal(np.asarray(words_to_f32(words)).view(np.uint32), nearest_even.astype(np.uint32) << 16)


# -- the registry ------------------------------------------------------------------------------------------


def test_every_tail_is_a_registered_token_wise_format():
    for kv_format in FORMATS.values():
        assert get_format(kv_format.name) is kv_format
        assert isinstance(kv_format, TokenFormat) == (kv_format.tail is None)
        assert kv_format.tail is None or isinstance(get_format(kv_format.tail), TokenFormat)


def test_an_unknown_precision_is_refused_with_the_known_ones_named():
    with pytest.raises(ValueError, match=r"'int3'.*fp32, bf16, fp16, int8, int4"):
        get_format("int3")


def test_a_name_cannot_be_taken_twice_nor_a_tail_be_missing():
    before = dict(FORMATS)
    with pytest.raises(ValueError, match="'int8' is registered already"):
        register(FORMATS["int8"])
    unusable = type("Int2", (type(FORMATS["int4"]),), {"name": "int2", "tail": "int4"})()
    with pytest.raises(ValueError, match="no registered token-wise format"):
        register(unusable)
    assert before == FORMATS
