"""fp8: its bit arithmetic is the e4m3 of everyone else, and its scale makes outliers cheap."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import SMALL, page_shape, store

from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.pallas_kernels.formats.fp8 import LARGEST, e4m3_to_f32, f32_to_e4m3

E4M3 = jnp.float8_e4m3fn
CODES = np.arange(256)
NAN_CODES = (0x7F, 0xFF)
NUMBERS = CODES.astype(np.uint8).view(E4M3).astype(np.float32)
POSITIVE = NUMBERS[:0x7F]

encode, decode = jax.jit(f32_to_e4m3), jax.jit(e4m3_to_f32)


def assert_rounded_as_by_jax(values: np.ndarray) -> None:
    expected = np.clip(values, -LARGEST, LARGEST).astype(E4M3).view(np.uint8)
    np.testing.assert_array_equal(encode(values), expected)


def test_every_code_stands_for_its_number_bit_for_bit():
    numbers = np.asarray(decode(CODES.astype(np.int32)))
    known = ~np.isin(CODES, NAN_CODES)
    np.testing.assert_array_equal(numbers.view(np.int32)[known], NUMBERS.view(np.int32)[known])
    assert numbers[~known].tolist() == [480, -480]


def test_only_the_lowest_8_bits_of_a_word_count():
    np.testing.assert_array_equal(decode(CODES.astype(np.int32) | 0x5A00), decode(CODES.astype(np.int32)))


def test_every_number_is_its_own_nearest():
    known = ~np.isin(CODES, NAN_CODES)
    np.testing.assert_array_equal(encode(NUMBERS[known]), CODES[known])


def test_ties_go_to_even_and_the_next_number_beside_a_tie_to_its_nearest():
    """Subnormals and the step from them to normal numbers included."""
    ties = (POSITIVE[:-1] + POSITIVE[1:]) / 2
    for values in (ties, np.nextafter(ties, np.float32(0)), np.nextafter(ties, np.float32(1e9))):
        assert_rounded_as_by_jax(np.concatenate([values, -values]))


def test_what_is_too_large_saturates():
    values = np.array([448, 463.99, 464, 464.01, 480, 1e5, 3e38, np.inf], np.float32)
    assert set(np.asarray(encode(values)).tolist()) == {0x7E}
    assert set(np.asarray(encode(-values)).tolist()) == {0xFE}


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_numbers_are_rounded_as_by_jax(seed):
    """Any finite bits, and numbers of sizes that e4m3 has."""
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**32, 10_000, np.uint32).view(np.float32)
    sizes = rng.standard_normal(10_000) * 10.0 ** rng.uniform(-5, 3, 10_000)
    assert_rounded_as_by_jax(np.where(np.isfinite(bits), bits, 0))
    assert_rounded_as_by_jax(sizes.astype(np.float32))


def test_an_outlier_costs_its_neighbours_nothing():
    """1,000 times their size, it would leave int8 nothing of them."""
    k = np.random.default_rng(1).uniform(0.5, 1.0, page_shape(SMALL)).astype(np.float32)
    k[..., 7] = 1000
    others = np.arange(SMALL.head_dim) != 7
    errors = {}
    for name in ("fp8", "int8"):
        found = store(FORMATS[name], k, k).k[..., others]
        errors[name] = np.abs(found / k[..., others] - 1).max()
    assert errors["fp8"] < 2.0**-4
    assert errors["int8"] == 1
