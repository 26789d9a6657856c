"""How far what is read back may be from what was written, by format, derived from each format's description."""

import functools
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import GEOMETRIES, PACKAGED, SMALL, every_packaged_format, page_shape, store

from fineserve_jax.pallas_kernels.formats import FORMATS

FLOAT32 = 1e-5  # room for float32 arithmetic, relative to what it is about
FP16_MAX = 65504.0
KINDS = ("normal", "zeros", "constant", "outlier", "channels", "one token")


def special_pages(kind: str, scale: float, seed: int, shape: tuple[int, ...]) -> np.ndarray:
    """f32[..., T, D] of a kind that quantisers find hard."""
    rng = np.random.default_rng(seed)
    x = scale * rng.standard_normal(shape)
    if kind == "zeros":
        x[:] = 0
    elif kind == "constant":
        x[:] = x.flat[0]
    elif kind == "outlier":
        x.reshape(-1)[rng.integers(x.size)] *= 1e6
    elif kind == "channels":  # some stay far from zero, as keys' do
        x += 50 * scale * (rng.random(shape[-1]) < 0.1)
    elif kind == "one token":
        x[..., 1:, :] = 0
    return x.astype(np.float32)


@st.composite
def written(draw):
    """Keys and values to write."""
    shape = page_shape(draw(st.sampled_from([SMALL, GEOMETRIES[1], GEOMETRIES[3]])))
    return [
        special_pages(
            draw(st.sampled_from(KINDS)),
            10 ** draw(st.floats(-6, 4)),
            draw(st.integers(0, 2**32 - 1)),
            shape,
        )
        for _ in "kv"
    ]


def rounding(significand_bits: int, smallest_spacing: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda x: np.maximum(2.0**-significand_bits * np.abs(x), smallest_spacing / 2)


def int8_bound(x: np.ndarray) -> np.ndarray:
    """Half a step; the step is the token's largest magnitude over 127, rounded to bf16."""
    return np.abs(x).max(-1, keepdims=True) / 127 * (1 + 2.0**-8) / 2 * (1 + FLOAT32)


def fp8_bound(x: np.ndarray) -> np.ndarray:
    """One part in 16; for what is very small beside the token's largest number, half a step of e4m3's subnormals."""
    scale = np.abs(x).max(-1, keepdims=True) / 448 * (1 + 2.0**-8)
    return np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * scale) * (1 + FLOAT32)


def int4_bound(x: np.ndarray, axis: int, codes: int = 15) -> np.ndarray:
    """Half a step of the range along `axis`, of rotated vectors.

    A range begins at one of 127 multiples of a unit that reaches the head's largest number, and its step is one of 255
    multiples of a unit that reaches the head's largest step, both rounded outwards; 1 % covers the units' own rounding.
    """
    low, high = x.min(axis, keepdims=True), x.max(axis, keepdims=True)
    low_unit = 1.01 * np.abs(x).max((-1, -2), keepdims=True) / 127
    step = (high - low + low_unit) / codes
    step_unit = 1.01 * step.max((-1, -2), keepdims=True) / 255
    return (step + step_unit) / 2 + FLOAT32 * np.abs(x).max((-1, -2), keepdims=True)


VALUE_BOUNDS = {
    "fp32": np.zeros_like,
    "bf16": rounding(8, 0.0),
    "fp16": rounding(11, 2.0**-24),
    "int8": int8_bound,
    "fp8": fp8_bound,
    "int4": lambda x: int4_bound(x, axis=-1),
    "int3": lambda x: int4_bound(x, axis=-1, codes=7),
}
KEY_BOUNDS = VALUE_BOUNDS | {
    "int4": lambda x: int4_bound(x, axis=-2),
    "int3": lambda x: int4_bound(x, axis=-2, codes=7),
}
RANGED = ("int4", "int3")  # formats of ranges, in units that a head shares, of rotated vectors
SMALLEST = 2.0**-100  # what quantising formats take for zero


def rotated(codec, x: np.ndarray) -> np.ndarray:
    """Vectors as the codec rotates them, float64."""
    return x.astype(np.float64) @ np.asarray(codec.rotate(jnp.eye(x.shape[-1])), np.float64)


def expected_of(kv_format, x: np.ndarray) -> np.ndarray:
    """What is approximated: fp16 saturates at its largest number."""
    return np.clip(x, -FP16_MAX, FP16_MAX) if kv_format.name == "fp16" else x


def assert_within(result, expected: np.ndarray, bound: np.ndarray) -> None:
    error = np.abs(np.asarray(result, np.float64) - expected)
    assert np.isfinite(error).all()
    excess = error - bound - SMALLEST
    worst = np.unravel_index(excess.argmax(), excess.shape)
    assert excess[worst] <= 0, f"{np.asarray(result)[worst]} for {expected[worst]} at {worst}"


def test_every_format_has_bounds():
    assert set(VALUE_BOUNDS) == set(KEY_BOUNDS) == set(PACKAGED)


@every_packaged_format
@settings(max_examples=12)
@given(case=written())
def test_what_is_read_is_within_half_a_step_of_what_was_written(kv_format, case):
    k, v = case
    stored = store(kv_format, k, v)
    for codec, read, read_own, x, bounds in (
        (kv_format.key, stored.k, stored.k_own, k, KEY_BOUNDS),
        (kv_format.value, stored.v, stored.v_own, v, VALUE_BOUNDS),
    ):
        x = expected_of(kv_format, x).astype(np.float64)
        own = rotated(codec, x)
        bound = bounds[codec.name](own)
        assert_within(read_own, own, bound)
        # The rotation back is orthogonal, so lengths of errors stay as they are.
        norm = functools.partial(np.linalg.norm, axis=-1)
        allowed = norm(np.broadcast_to(bound + SMALLEST, x.shape)) + FLOAT32 * norm(x) * (kv_format.name in RANGED)
        assert (norm(read - x) <= allowed).all()


@every_packaged_format
@settings(max_examples=6)
@given(case=written())
def test_encoding_again_what_was_read_changes_next_to_nothing(kv_format, case):
    """Nothing at all, except for int4 and int3, whose ranges are fitted anew: there it is one more rounding."""
    k, v = case
    once = store(kv_format, k, v)
    twice = store(kv_format, once.k, once.v)
    if kv_format.name not in RANGED:
        np.testing.assert_array_equal(twice.k, once.k)
        np.testing.assert_array_equal(twice.v, once.v)
        return
    k_own, v_own = once.k_own.astype(np.float64), once.v_own.astype(np.float64)
    assert_within(twice.k_own, k_own, KEY_BOUNDS[kv_format.name](k_own))
    assert_within(twice.v_own, v_own, VALUE_BOUNDS[kv_format.name](v_own))


@every_packaged_format
@pytest.mark.parametrize("value", [0.0, 1.0, -1.0])
def test_zero_stays_zero_and_constant_keys_stay_close(kv_format, value):
    """(A constant *value* vector is a single outlier when int4 has rotated it, and has that error.)"""
    constant = np.full(page_shape(SMALL), value, np.float32)
    stored = store(kv_format, constant, constant)
    np.testing.assert_allclose(stored.k, constant, rtol=0.01)
    if value == 0:
        np.testing.assert_array_equal(stored.k, 0)
        np.testing.assert_array_equal(stored.v, 0)


@every_packaged_format
def test_huge_numbers_stay_finite(kv_format):
    huge = special_pages("normal", 1e30, 0, page_shape(SMALL))
    assert all(np.isfinite(part).all() for part in store(kv_format, huge, -huge)[1:])


@pytest.mark.parametrize("name", [name for name, kv_format in FORMATS.items() if kv_format.residual is None])
@settings(max_examples=6)
@given(seed=st.integers(0, 2**32 - 1), where=st.tuples(*(st.integers(0, n - 1) for n in page_shape(SMALL)[:-1])))
def test_tokens_of_a_token_wise_format_do_not_see_each_other(name, seed, where):
    """A token's scale is its own: an outlier elsewhere in the page changes nothing."""
    k = special_pages("normal", 1.0, seed, page_shape(SMALL))
    wild = k.copy()
    wild[where] *= 1e6
    others = np.ones(k.shape[:-1], bool)
    others[where] = False
    before, after = store(FORMATS[name], k, wild), store(FORMATS[name], wild, k)
    np.testing.assert_array_equal(before.k[others], after.k[others])
    np.testing.assert_array_equal(before.v[others], after.v[others])


# -- int8 --------------------------------------------------------------------------------------------------


def test_int8_codes_stay_within_127_for_every_rounding_of_the_scale():
    """-128 would mean that the largest value of a vector had wrapped around, or that the scale was not symmetric."""
    *vectors, head_dim = page_shape(SMALL)
    largest = np.linspace(1.0, 2.0, math.prod(vectors), dtype=np.float32).reshape(*vectors, 1)
    k = largest * np.linspace(1, -1, head_dim, dtype=np.float32)
    stored = store(FORMATS["int8"], k, -k)
    for part in (*stored.words.k.words, *stored.words.v.words):
        codes = part.view(np.int8)
        assert (codes.min(), codes.max()) == (-127, 127)
    np.testing.assert_array_equal(stored.v, -stored.k)
    assert_within(stored.k, k.astype(np.float64), int8_bound(k))


# -- fp16 --------------------------------------------------------------------------------------------------


def test_fp16_saturates_instead_of_overflowing():
    huge = np.full(page_shape(SMALL), 1e30, np.float32)
    stored = store(FORMATS["fp16"], huge, -huge)
    np.testing.assert_array_equal(stored.k, FP16_MAX)
    np.testing.assert_array_equal(stored.v, -FP16_MAX)


# -- int4 --------------------------------------------------------------------------------------------------


@every_packaged_format
@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128, 256])
def test_a_formats_rotation_is_orthogonal_and_the_way_back_undoes_it(kv_format, head_dim):
    for codec in kv_format.sides:
        there = np.asarray(codec.rotate(jnp.eye(head_dim)), np.float64)
        back = np.asarray(codec.unrotate(jnp.eye(head_dim)), np.float64)
        np.testing.assert_allclose(there @ there.T, np.eye(head_dim), atol=1e-6)
        np.testing.assert_allclose(there @ back, np.eye(head_dim), atol=1e-6)


@pytest.mark.parametrize("head_dim", [64, 80, 96, 256])
def test_the_rotation_of_int4_spreads_an_outlier_over_as_many_channels_as_it_can(head_dim):
    block = head_dim & -head_dim  # the largest power of two in it
    matrix = np.abs(FORMATS["int4"].key.rotate(jnp.eye(head_dim)))
    np.testing.assert_allclose(matrix[matrix > 0], block**-0.5, rtol=1e-6)
    assert ((matrix > 0).sum(axis=-1) == block).all()


@pytest.mark.parametrize("geometry", GEOMETRIES[:2], ids=["64", "96"])
def test_what_lies_on_the_grid_of_int4_comes_back_as_it_was(geometry):
    """Nearly: the grid's own begin and step are rounded outwards."""
    int4 = FORMATS["int4"]
    ladder = np.resize(np.arange(16, dtype=np.float32), page_shape(geometry))
    vectors = np.asarray(int4.value.unrotate(ladder))
    error = np.linalg.norm(store(int4, vectors, vectors).v - vectors, axis=-1)
    assert (error < 0.02 * np.linalg.norm(vectors, axis=-1)).all()
