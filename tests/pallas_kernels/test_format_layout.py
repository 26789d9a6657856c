"""How pages lie in the arena, and what a cached value costs."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    ALL_FORMATS,
    GEOMETRIES,
    PACKAGED,
    PAGES,
    SMALL,
    every_format,
    every_geometry,
    make_geometry,
    page_shape,
    store,
    unpack,
)

from fineserve_jax.pallas_kernels.arena import new_arena
from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES, get_format_sizes, pair_name
from fineserve_jax.pallas_kernels.formats import FORMATS, Granularity, KVFormat, get_format, register
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
    content = 0
    for codec in kv_format.sides:
        block = codec.block_words(geometry)
        assert block * 16 == geometry.page_size * geometry.head_dim * codec.value_bits
        sizes = {
            Granularity.TOKEN: geometry.page_size,
            Granularity.CHANNEL: geometry.head_dim // codec.packed_lanes,
            Granularity.PAGE: 1,
        }
        content += geometry.kv_heads * (block + sum(sizes[part] for part in codec.scales))
    assert kv_format.words_per_layer(geometry) == content
    assert kv_format.units_per_layer(geometry) == math.ceil(content / geometry.unit_words)
    assert kv_format.page_units(geometry) == geometry.num_layers * kv_format.units_per_layer(geometry)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_scales_follow_the_values_one_behind_the_other(kv_format, geometry):
    """Arrays of one word a head come last."""
    sizes = [codec.scale_sizes(geometry) for codec in kv_format.sides]
    starts = [kv_format.scale_starts(geometry)[side][i] for side, i in kv_format.scale_order()]
    ends = [
        kv_format.scale_starts(geometry)[side][i] + geometry.kv_heads * sizes[side][i]
        for side, i in kv_format.scale_order()
    ]
    values = geometry.kv_heads * sum(codec.block_words(geometry) for codec in kv_format.sides)
    assert [values, *ends][: len(starts)] == starts
    assert [values, *ends][-1] == kv_format.words_per_layer(geometry)
    by_page = [kv_format.sides[side].scales[i] is Granularity.PAGE for side, i in kv_format.scale_order()]
    assert by_page == sorted(by_page)


@every_format
@given(geometry=ANY_GEOMETRY)
def test_a_value_is_a_part_of_a_word_or_several_words(kv_format, geometry):
    for codec in kv_format.sides:
        assert codec.packed_lanes * codec.value_bits == 16 * codec.word_parts
        assert codec.width(geometry) * codec.packed_lanes == geometry.head_dim
        assert codec.width(geometry) * codec.word_parts == codec.vector_words(geometry)


@every_format
@given(geometry=ANY_GEOMETRY.filter(lambda geometry: len(geometry.unit_shape) == 1))
def test_a_heads_block_is_whole_units_but_on_tpus(kv_format, geometry):
    for codec in kv_format.sides:
        if codec.value_bits >= NARROWEST_BITS:
            assert codec.block_words(geometry) % geometry.unit_words == 0


@every_format
@given(geometry=ANY_GEOMETRY)
def test_bits_per_value_count_scales_and_padding(kv_format, geometry):
    values = 2 * geometry.num_layers * geometry.kv_heads * geometry.page_size * geometry.head_dim
    page_bits = 16 * kv_format.page_units(geometry) * geometry.unit_words
    assert kv_format.bits_per_value(geometry) == pytest.approx(page_bits / values)
    assert kv_format.bits_per_value(geometry) >= kv_format.value_bits


@pytest.mark.parametrize(
    ("name", "most"),
    list(zip(PACKAGED, (32.0, 16.0, 16.0, 8.34, 8.34, 4.75, 3.75), strict=True)),
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
        for codec, side in zip(kv_format.sides, words, strict=True):
            part = (*lead, geometry.page_size, codec.width(geometry))
            assert [word.shape for word in side.words] == [part] * codec.word_parts
            ends = {
                Granularity.TOKEN: (geometry.page_size, 1),
                Granularity.CHANNEL: (1, codec.width(geometry)),
                Granularity.PAGE: (1, 1),
            }
            assert [scales.shape for scales in side.scales] == [(*lead, *ends[kind]) for kind in codec.scales]
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
    for codec, side in zip(kv_format.sides, some_words(kv_format), strict=True):
        scales = codec.read_scales(side.scales)
        spread = tuple(np.broadcast_to(part, side.words[0].shape) for part in scales)
        expected, found = (codec.unpack(side.words, part).scaled_lanes() for part in (scales, spread))
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@every_format
def test_pages_and_heads_are_unpacked_each_by_itself(kv_format):
    """A kernel sees one page of one head at a time."""
    words = some_words(kv_format)
    whole = [side.scaled_lanes() for side in unpack(kv_format, words)]
    where = (1, 0, PAGES // 2)
    found = [side.scaled_lanes() for side in unpack(kv_format, jax.tree.map(lambda part: part[where], words))]
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda part: part[where], whole))


@pytest.mark.parametrize("name", [name for name, kv_format in ALL_FORMATS.items() if kv_format.value.scales])
def test_values_that_have_a_scale_are_finite_for_any_words(name):
    """Attention clears only the scales of tokens that do not count, so 0 * NaN must not come from the values."""
    codec, words = ALL_FORMATS[name].value, (jnp.arange(2**16, dtype=jnp.uint16).reshape(-1, 64),)
    scales = tuple(jnp.ones((1, 1)) for _ in codec.read_scales(some_words(ALL_FORMATS[name]).v.scales))
    vectors = codec.unpack(words * codec.word_parts, scales)
    assert vectors.scale is not None
    assert all(np.isfinite(lane).all() for lane in vectors.lanes)


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
    with pytest.raises(ValueError, match=r"'int5'.*fp32, bf16, fp16, int8, fp8, int4.*or a pair such as k8v4"):
        get_format("int5")


def test_a_pair_is_the_codecs_of_two_formats():
    """Any: that of keys from one, that of values from the other; the same object each time, and the same sizes."""
    for key in PACKAGED.values():
        for value in PACKAGED.values():
            name = pair_name(key.key.name, value.value.name)
            pair = get_format(name)
            assert pair is get_format(name)
            assert (pair.name, pair.key, pair.value) == (name, key.key, value.value)
            for geometry in GEOMETRIES:
                assert get_format_sizes(name).page_units(geometry) == pair.page_units(geometry)
            residual = [codec.residual or codec.name for codec in pair.sides]
            assert pair.residual == (None if residual == [codec.name for codec in pair.sides] else pair_name(*residual))
            assert pair.residual is None or get_format(pair.residual).residual is None
    assert get_format("k8v4").sides == (FORMATS["int8"].key, FORMATS["int4"].value)
    assert get_format("kbf16v4").residual == "kbf16v8"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("k8v5", r"'k8v5': no codec of values is called '5'; use fp32, bf16, fp16, 8, fp8, 4, 3"),
        ("k5v8", r"'k5v8': no codec of keys is called '5'; use fp32"),
        ("k8v8", "'k8v8' is called 'int8'"),
    ],
)
def test_a_pair_that_there_is_not_is_refused(name, message):
    for find in (get_format, get_format_sizes):
        with pytest.raises(ValueError, match=message):
            find(name)


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"name": "int8"}, "'int8' is registered already; choose another name"),
        ({"name": "new", "residual": "int4"}, "wants 'int4' for its newest tokens, which is not token-wise"),
        ({"name": "new", "residual": "fp4"}, r"wants 'fp4' for its newest tokens, which there is not \(.*bf16"),
        ({"name": "new", "residual": None}, r"scales \(channel, .*page\) that take a whole page.*name.*as `residual`"),
    ],
    ids=["taken", "page-wise residual", "unknown residual", "no residual page"],
)
def test_a_format_that_cannot_work_is_refused(attributes, message):
    before = dict(FORMATS)
    codec = type("Unusable", (type(FORMATS["int4"].key),), attributes)()
    with pytest.raises(ValueError, match=message):
        register(KVFormat(codec, codec))
    assert before == FORMATS == FORMAT_SIZES


def test_a_format_from_outside_the_package_can_be_registered():
    try:
        assert get_format(register(ALL_FORMATS["int2"]).name).value_bits == 2
        assert get_format_sizes("int2") is get_format("int2")
    finally:
        del FORMATS["int2"], FORMAT_SIZES["int2"]
