"""Rotary embedding: its defining property, and the stretched variants."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.models import ModelConfig, RopeScaling
from fineserve_jax.models.rope import apply_rope, rope_frequencies, rope_tables

BASE = ModelConfig("llama", 96, 64, 2, 4, 2, 16, 64, rope_theta=1000.0)
LLAMA3 = RopeScaling("llama3", 8.0, 64)


def turn(config, x, position):
    tables = rope_tables(config, jnp.array([position], jnp.int32))
    return np.asarray(apply_rope(jnp.asarray(x)[None, None], *tables))[0, 0].astype(np.float64)


@given(st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 4000), st.integers(0, 2**31))
@settings(max_examples=30)
def test_dot_products_depend_on_the_distance_only(i, j, shift, seed):
    q, k = np.random.default_rng(seed).standard_normal((2, 16)).astype(np.float32)
    near = turn(BASE, q, i) @ turn(BASE, k, j)
    far = turn(BASE, q, i + shift) @ turn(BASE, k, j + shift)
    assert near == pytest.approx(far, abs=0.01)


def test_pairs_are_half_a_head_apart():
    x = np.zeros(16, np.float32)
    x[3] = 1.0
    turned = turn(BASE, x, 5)
    angle = 5 * 1000.0 ** (-3 / 8)
    assert np.flatnonzero(turned).tolist() == [3, 11]
    np.testing.assert_allclose(turned[[3, 11]], [np.cos(angle), np.sin(angle)], rtol=1e-5)


def test_linear_scaling_divides_positions():
    stretched = dataclasses.replace(BASE, rope_scaling=RopeScaling("linear", 4.0))
    x = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    np.testing.assert_allclose(turn(stretched, x, 40), turn(BASE, x, 10), rtol=1e-5, atol=1e-6)


def test_llama3_keeps_fast_frequencies_and_divides_slow_ones():
    plain, _ = rope_frequencies(BASE)
    freqs, factor = rope_frequencies(dataclasses.replace(BASE, rope_scaling=LLAMA3))
    turns = 64 * plain / (2 * np.pi)
    ratio = plain / freqs
    np.testing.assert_allclose(ratio[turns > 4.0], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[turns < 1.0], 8.0, rtol=1e-6)
    between = ratio[(turns > 1.0) & (turns < 4.0)]
    assert len(between) > 0
    assert np.all((between > 1.0) & (between < 8.0))
    assert factor == 1.0


def test_spelled_out_factors_equal_the_formula_they_came_from():
    plain, _ = rope_frequencies(BASE)
    freqs, _ = rope_frequencies(dataclasses.replace(BASE, rope_scaling=LLAMA3))
    spelled = RopeScaling("factors", factors=tuple(float(f) for f in plain / freqs))
    again, _ = rope_frequencies(dataclasses.replace(BASE, rope_scaling=spelled))
    np.testing.assert_allclose(again, freqs, rtol=1e-6)


def test_yarn_scales_the_rotation_as_published():
    scaling = RopeScaling("yarn", 16.0, 64)
    _, derived = rope_frequencies(dataclasses.replace(BASE, rope_scaling=scaling))
    assert derived == pytest.approx(0.1 * np.log(16.0) + 1.0)
    _, stated = rope_frequencies(
        dataclasses.replace(BASE, rope_scaling=dataclasses.replace(scaling, attention_factor=1.0))
    )
    assert stated == 1.0
