"""How pages lie in the arena, and what a cached value costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import ALL_FORMATS, PAGES, SMALL, every_format, every_geometry, make_geometry, page_shape, store

from fineserve_jax.pallas_kernels.arena import new_arena
from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES, get_format_sizes
from fineserve_jax.pallas_kernels.formats import FORMATS, Granularity, get_format, register
from fineserve_jax.pallas_kernels.formats.bit_packing import (
    bf16_to_words,
    largest,
    pack_lanes,
    smallest,
    unpack_signed,
    unpack_unsigned,
    words_to_f32,
)
from fineserve_jax.pallas_kernels.geometry import (
    MAX_UNIT_WORDS,
    NARROWEST_BITS,
    PageGeometry,
    choose_unit_words,
)

ANY_GEOMETRY = st.builds(
    make_geometry,
    kv_heads=st.integers(1, 16),
    head_dim=st.sampled_from([32, 64, 80, 96, 128, 192, 256]),
    page_size=st.sampled_from([4, 8, 16, 32, 64]),
    num_layers=st.integers(1, 40),
    tpu=st.booleans(),
)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_a_page_is_its_layers_in_whole_units(kv_format, geometry):
    heads, block = geometry.kv_heads, kv_format.block_words(geometry)
    assert block * 16 == geometry.page_size * geometry.head_dim * kv_format.value_bits
    sizes = {
        Granularity.TOKEN: geometry.page_size,
        Granularity.CHANNEL: geometry.head_dim // kv_format.packed_lanes,
        Granularity.PAGE: 1,
    }
    content = heads * (2 * block + sum(sizes[part] for part in kv_format.scales))
    assert kv_format.words_per_layer(geometry) == content
    assert kv_format.units_per_layer(geometry) == math.ceil(content / geometry.unit_words)
    assert kv_format.page_units(geometry) == geometry.num_layers * kv_format.units_per_layer(geometry)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_scales_follow_the_values_one_behind_the_other(kv_format, geometry):
    starts, sizes = kv_format.scale_starts(geometry), kv_format.scale_sizes(geometry)
    ends = [start + geometry.kv_heads * size for start, size in zip(starts, sizes, strict=True)]
    values = 2 * geometry.kv_heads * kv_format.block_words(geometry)
    assert [values, *ends][: len(starts)] == list(starts)
    assert [values, *ends][-1] == kv_format.words_per_layer(geometry)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_a_value_is_a_part_of_a_word_or_several_words(kv_format, geometry):
    assert kv_format.packed_lanes * kv_format.value_bits == 16 * kv_format.word_parts
    assert kv_format.width(geometry) * kv_format.packed_lanes == geometry.head_dim
    assert kv_format.width(geometry) * kv_format.word_parts == kv_format.vector_words(geometry)


@every_format
@given(geometry=ANY_GEOMETRY.filter(lambda geometry: len(geometry.unit_shape) == 1))
def test_a_heads_block_is_whole_units_but_on_tpus(kv_format, geometry):
    if kv_format.value_bits >= NARROWEST_BITS:
        assert kv_format.block_words(geometry) % geometry.unit_words == 0


@every_format
@given(geometry=ANY_GEOMETRY)
def test_bits_per_value_count_scales_and_padding(kv_format, geometry):
    values = 2 * geometry.num_layers * geometry.kv_heads * geometry.page_size * geometry.head_dim
    page_bits = 16 * kv_format.page_units(geometry) * geometry.unit_words
    assert kv_format.bits_per_value(geometry) == pytest.approx(page_bits / values)
    assert kv_format.bits_per_value(geometry) >= kv_format.value_bits


@pytest.mark.parametrize(
    ("name", "most"), [("fp32", 32.0), ("bf16", 16.0), ("fp16", 16.0), ("int8", 8.34), ("fp8", 8.34), ("int4", 4.75)]
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


@given(head_dim=st.sampled_from([32, 64, 80, 96, 128]), page_size=st.sampled_from([4, 16, 128]))
def test_a_unit_on_a_tpu_is_a_tile(head_dim, page_size):
    geometry = make_geometry(2, head_dim, page_size, tpu=True)
    assert (geometry.unit_words, geometry.unit_shape) == (1024, (8, 128))


@pytest.mark.parametrize(("unit_words", "shape"), [(128, (128,)), (64, (64,)), (1024, (8, 128)), (2048, (16, 128))])
def test_an_arena_is_made_of_units(unit_words, shape):
    geometry = PageGeometry(num_layers=1, kv_heads=1, head_dim=64, page_size=16, unit_words=unit_words)
    arena = new_arena(geometry, 3)
    assert (arena.shape, arena.dtype) == ((3, *shape), np.dtype(np.uint16))
    assert not np.asarray(arena).any()


@every_format
@every_geometry
def test_encode_gives_the_words_that_the_layout_has_room_for(kv_format, geometry):
    """And with any axes in front."""
    for lead in ((geometry.kv_heads, 2), (2, 1, 3), ()):
        vector = jax.ShapeDtypeStruct((*lead, geometry.page_size, geometry.head_dim), np.float32)
        words = jax.eval_shape(kv_format.encode_vectors, vector, vector)
        part = (*lead, geometry.page_size, kv_format.width(geometry))
        assert [word.shape for word in (*words.k, *words.v)] == [part] * 2 * kv_format.word_parts
        ends = {
            Granularity.TOKEN: (geometry.page_size, 1),
            Granularity.CHANNEL: (1, kv_format.width(geometry)),
            Granularity.PAGE: (1, 1),
        }
        assert [scales.shape for scales in words.scales] == [(*lead, *ends[kind]) for kind in kv_format.scales]
        assert {part.dtype for part in jax.tree.leaves(words)} == {np.dtype(np.uint16)}
        read = jax.eval_shape(kv_format.decode_vectors, words)
        assert [(part.shape, part.dtype) for part in read] == [(vector.shape, vector.dtype)] * 2


# -- what kernels rely on ----------------------------------------------------------------------------------


def some_words(kv_format):
    rng = np.random.default_rng(1)
    return store(kv_format, *(rng.standard_normal(page_shape(SMALL), np.float32) for _ in "kv")).words


@every_format
def test_scales_may_be_spread_over_the_page_before_they_are_used(kv_format):
    """Whatever shape a kernel loads scales in, values come out the same."""
    words = some_words(kv_format)
    scales = kv_format.read_scales(words.scales)
    spread = tuple(np.broadcast_to(part, words.k[0].shape) for part in scales)
    expected, found = (kv_format.unpack(words.k, words.v, part).scaled_lanes() for part in (scales, spread))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@every_format
def test_pages_and_heads_are_unpacked_each_by_itself(kv_format):
    """A kernel sees one page of one head at a time."""
    words = some_words(kv_format)
    whole = kv_format.unpack(words.k, words.v, kv_format.read_scales(words.scales)).scaled_lanes()
    where = (1, 0, PAGES // 2)
    one = jax.tree.map(lambda part: part[where], words)
    found = kv_format.unpack(one.k, one.v, kv_format.read_scales(one.scales)).scaled_lanes()
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda part: part[where], whole))


@pytest.mark.parametrize("name", [name for name, kv_format in ALL_FORMATS.items() if kv_format.scales])
def test_values_that_have_a_scale_are_finite_for_any_words(name):
    """Attention clears only the scales of tokens that do not count, so 0 * NaN must not come from the values."""
    kv_format, words = ALL_FORMATS[name], (jnp.arange(2**16, dtype=jnp.uint16).reshape(-1, 64),)
    scales = tuple(jnp.ones((1, 1)) for _ in kv_format.read_scales(some_words(kv_format).scales))
    vectors = kv_format.unpack(words, words, scales)
    assert vectors.v_scale is not None
    assert all(np.isfinite(lane).all() for lane in vectors.v)


# -- words -------------------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(bits=st.sampled_from([2, 4, 8]), seed=st.integers(0, 2**32 - 1))
def test_lanes_are_slices_of_the_vector_and_both_readings_undo_packing(bits, seed):
    """Word w holds the values w, w + D/n, w + 2D/n ... in its bits from the lowest up."""
    count, largest = 16 // bits, 2**bits
    values = np.random.default_rng(seed).integers(0, largest, (3, 64), np.int32)
    lanes = tuple(np.split(values, count, axis=-1))
    words = np.asarray(pack_lanes(lanes, bits))
    by_hand = sum(lane << (bits * i) for i, lane in enumerate(lanes))
    np.testing.assert_array_equal(words, by_hand)
    np.testing.assert_array_equal(np.concatenate(unpack_unsigned(words, bits), axis=-1), values)
    signed = np.where(values >= largest // 2, values - largest, values)
    np.testing.assert_array_equal(np.concatenate(unpack_signed(words, bits), axis=-1), signed)
    np.testing.assert_array_equal(pack_lanes(tuple(np.split(signed, count, axis=-1)), bits), words)


@given(seed=st.integers(0, 2**32 - 1), lanes=st.sampled_from([1, 2, 8]))
@settings(max_examples=10)
def test_the_extremes_of_a_vector_are_those_of_all_its_planes(seed, lanes):
    values = np.random.default_rng(seed).standard_normal((3, 64), np.float32)
    parts = tuple(np.split(values, lanes, axis=-1))
    np.testing.assert_array_equal(largest(parts), values.max(-1, keepdims=True))
    np.testing.assert_array_equal(smallest(parts), values.min(-1, keepdims=True))


@settings(max_examples=20)
@given(st.lists(st.floats(width=32, allow_nan=False, allow_subnormal=False), min_size=4, max_size=4))
def test_bf16_words_are_the_upper_halves_of_the_nearest_floats(values):
    values = np.array(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    nearest_even = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    words = np.asarray(bf16_to_words(values))
    np.testing.assert_array_equal(words, nearest_even)
    np.testing.assert_array_equal(np.asarray(words_to_f32(words)).view(np.uint32), nearest_even.astype(np.uint32) << 16)


# -- the registry ------------------------------------------------------------------------------------------


def test_every_residual_is_a_registered_token_wise_format():
    for name, kv_format in FORMATS.items():
        assert get_format(name) is kv_format
        assert kv_format.name == name
        assert kv_format.residual is None or get_format(kv_format.residual).residual is None


def test_an_unknown_precision_is_refused_with_the_known_ones_named():
    with pytest.raises(ValueError, match=r"'int3'.*fp32, bf16, fp16, int8, fp8, int4"):
        get_format("int3")


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "int8"}, "'int8' is registered already; choose another name"),
        (
            {"name": "new", "residual": "int4"},
            "wants 'int4' for its newest tokens, which is no registered token-wise format",
        ),
        ({"name": "new", "residual": "fp4"}, "wants 'fp4' for its newest tokens"),
        ({"name": "new", "residual": None}, r"scales \(channel, .*page\) that take a whole page.*name.*as `residual`"),
    ],
    ids=["taken", "page-wise residual", "unknown residual", "no residual page"],
)
def test_a_format_that_cannot_work_is_refused(attributes, message):
    before = dict(FORMATS)
    with pytest.raises(ValueError, match=message):
        register(type("Unusable", (type(FORMATS["int4"]),), attributes)())
    assert before == FORMATS == FORMAT_SIZES


def test_a_format_from_outside_the_package_can_be_registered():
    try:
        assert get_format(register(ALL_FORMATS["int2"]).name).value_bits == 2
        assert get_format_sizes("int2") is get_format("int2")
    finally:
        del FORMATS["int2"], FORMAT_SIZES["int2"]
