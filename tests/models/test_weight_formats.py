"""Each weight format: bounded encoding error, and products equal to float64 products of what is stored."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_oracle import FIXTURES, case_expected, case_tensors, flax_logits, float64_logits

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import build_model, pack_params
from fineserve_jax.models.weight_formats import (
    BFloat16Weights,
    Float32Weights,
    Int4Weights,
    Int8Weights,
    WeightFormat,
    weight_recipe,
)

FORMATS: dict[str, WeightFormat] = {
    "fp32": Float32Weights(),
    "bf16": BFloat16Weights(),
    "int8": Int8Weights(),
    "int4": Int4Weights(),
}
LOGIT_ERROR = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05, "int4": 0.02}


def decode(name, stored):
    """f64[out, in] of the stored arrays, written apart from the code under test."""
    kernel = np.asarray(stored["kernel"])
    if name in ("fp32", "bf16"):
        return kernel.astype(np.float64)
    scale = np.asarray(stored["scale"], np.float64)
    if name == "int8":
        return kernel.astype(np.float64) * scale[:, None]
    minimum = np.asarray(stored["minimum"], np.float64)
    out, half = kernel.shape
    matrix = np.empty((out, 2 * half))
    for column in range(2 * half):
        byte = kernel[:, column % half]
        code = byte & 15 if column < half else byte >> 4
        matrix[:, column] = code * scale[:, column // 32] + minimum[:, column // 32]
    return matrix


def rounded_activations(name, x):
    """What each format makes of activations before it multiplies."""
    if name == "fp32":
        return x.astype(np.float64)
    if name in ("bf16", "int4"):
        return x.astype(jnp.bfloat16).astype(np.float64)
    top = np.abs(x).max(axis=1, keepdims=True)
    return np.rint(x * (np.float32(127) / top)).clip(-127, 127).astype(np.float64) * (top / 127)


def random_matrix(seed, out=48, inner=128, spread=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((out, inner)) * np.exp(spread * rng.standard_normal((out, 1)))).astype(np.float32)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [1, 33])
def test_products_equal_float64_products_of_the_stored_values(name, rows):
    fmt, matrix, x = FORMATS[name], random_matrix(1), random_matrix(2, rows)
    stored = fmt.pack(matrix)
    dense = decode(name, stored)
    if name == "int4":  # dequantised to bf16 for the product
        dense = dense.astype(np.float32).astype(jnp.bfloat16).astype(np.float64)
    expected = rounded_activations(name, x) @ dense.T
    found = fmt.dot({key: jnp.asarray(value) for key, value in stored.items()}, jnp.asarray(x))
    assert (found.dtype, found.shape) == (jnp.float32, (rows, 48))
    scale = np.abs(x).max(axis=1)[:, None] * np.abs(dense).max(axis=1)[None, :]
    assert np.max(np.abs(found - expected) / scale) < 2e-5


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_the_stored_rows(name):
    stored = FORMATS[name].pack(random_matrix(3))
    ids = np.array([7, 0, 47, 7], np.int32)
    found = FORMATS[name].rows({key: jnp.asarray(value) for key, value in stored.items()}, jnp.asarray(ids))
    tolerance = 2**-8 if name == "int4" else 1e-6  # int4 dequantises to bf16
    np.testing.assert_allclose(found, decode(name, stored)[ids], rtol=tolerance, atol=1e-6)


@given(seed=st.integers(0, 2**32 - 1), magnitude=st.floats(1e-3, 1e3))
@settings(max_examples=40)
def test_int8_encodes_within_half_a_step_and_keeps_the_extremes(seed, magnitude):
    matrix = random_matrix(seed, out=6) * np.float32(magnitude)
    stored = Int8Weights().pack(matrix)
    step = np.abs(matrix).max(axis=1, keepdims=True) / 127
    assert np.all(np.abs(decode("int8", stored) - matrix) <= step * 0.5001)
    assert stored["kernel"].min() >= -127
    assert np.all(np.abs(stored["kernel"]).max(axis=1) == 127)


@given(seed=st.integers(0, 2**32 - 1), shift=st.floats(-2, 2))
@settings(max_examples=40)
def test_int4_encodes_within_half_a_step_of_its_group(seed, shift):
    matrix = random_matrix(seed, out=6, spread=0.3) + np.float32(shift)
    groups = matrix.reshape(6, -1, 32)
    step = (groups.max(axis=2) - groups.min(axis=2)) / 15
    # Rounding scale and minimum to float16 may move an end by 15 * 2^-11 of a step and 2^-11 of the minimum.
    slack = step * (0.5 + 15 * 2.0**-11) + np.abs(groups.min(axis=2)) * 2.0**-10
    error = np.abs(decode("int4", Int4Weights().pack(matrix)) - matrix).reshape(groups.shape)
    assert np.all(error <= slack[:, :, None])


@pytest.mark.parametrize("name", FORMATS)
def test_constant_and_zero_rows_survive(name):
    matrix = np.zeros((3, 64), np.float32)
    matrix[1], matrix[2, 5] = 0.25, -1.0
    np.testing.assert_allclose(decode(name, FORMATS[name].pack(matrix)), matrix, atol=1e-3)
    zeros = FORMATS[name].dot({k: jnp.asarray(v) for k, v in FORMATS[name].pack(matrix).items()}, jnp.zeros((2, 64)))
    np.testing.assert_array_equal(zeros, 0.0)


def test_int4_refuses_widths_it_cannot_split():
    with pytest.raises(ModelLoadError, match=r"divisible by 64.*one of 96.*int8"):
        Int4Weights().declare(4, 96)


def test_an_unknown_precision_is_refused_with_the_known_ones():
    with pytest.raises(ModelLoadError, match=r"'fp8'.*fp32, bf16, int8, int4"):
        weight_recipe("fp8")


def _dequantised(source, weights):
    """The checkpoint's tensors as the format stores them, by Hugging Face name."""
    recipe, tied = weight_recipe(weights), source.config.tie_embeddings
    names = {Float32Weights: "fp32", BFloat16Weights: "bf16", Int8Weights: "int8", Int4Weights: "int4"}
    tensors = {name: tensor.astype(np.float32) for name, tensor in case_tensors(source.directory.name).items()}
    for name, tensor in tensors.items():
        if tensor.ndim == 2:
            fmt = recipe.linear
            if "embed_tokens" in name:
                fmt = recipe.head if tied else recipe.embedding
            elif "lm_head" in name:
                fmt = recipe.head
            tensors[name] = decode(names[type(fmt)], fmt.pack(tensor))
    return tensors


@pytest.mark.parametrize("case", ["smollm2", "qwen3"])  # tied and untied
@pytest.mark.parametrize("weights", FORMATS)
def test_logits_follow_the_dequantised_weights(case, weights):
    """Within what rounding of activations costs; an error in packing or fusing costs far more."""
    source = HFModel(FIXTURES / case)
    tokens, _ = case_expected(case)
    expected = float64_logits(source.config, _dequantised(source, weights), tokens)
    found = flax_logits(build_model(source.config, weights), pack_params(source.config, weights, source), tokens)
    error = np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2))
    assert error < LOGIT_ERROR[weights]
