"""Every family computes what Hugging Face transformers computes, on a flat ragged token axis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_oracle import (
    CASES,
    FIXTURES,
    case_config,
    case_expected,
    case_tensors,
    causal_attend,
    flax_logits,
    float64_logits,
)

from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import WEIGHT_RECIPES, abstract_params, build_model, pack_params, random_params


@pytest.fixture(params=CASES)
def case(request):
    return request.param


def _load(case, weights="fp32"):
    source = HFModel(FIXTURES / case)
    return build_model(source.config, weights), pack_params(source.config, weights, source)


def test_logits_equal_those_of_transformers(case):
    model, params = _load(case)
    tokens, expected = case_expected(case)
    np.testing.assert_allclose(flax_logits(model, params, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["smollm2", "mistral", "qwen2", "qwen3"], indirect=True)
def test_the_float64_oracle_agrees_with_transformers(case):
    tokens, expected = case_expected(case)
    logits = float64_logits(hf_config(case_config(case)), case_tensors(case), tokens)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["llama", "mistral", "phi3_long", "cohere2", "qwen3_moe_dense"], indirect=True)
def test_tokens_may_lie_in_any_order_beside_other_sequences(case):
    """Only positions and `attend` say which token is which: rows are independent everywhere else."""
    model, params = _load(case)
    tokens, expected = case_expected(case)
    other = tokens[::-1][:11]
    order = np.random.default_rng(0).permutation(len(tokens) + len(other))
    flat = np.concatenate([tokens, other])[order]
    positions = np.concatenate([np.arange(len(tokens)), np.arange(len(other))])[order]
    sequence = np.repeat([0, 1], [len(tokens), len(other)])[order]
    attend = causal_attend(model.config, positions, sequence)
    logits = np.empty_like(expected, shape=(len(order), expected.shape[1]))
    logits[order] = flax_logits(model, params, flat, positions, attend)
    np.testing.assert_allclose(logits[: len(tokens)], expected, rtol=1e-4, atol=2e-5)


def test_attend_is_called_once_per_layer_with_heads_apart(case):
    cfg, calls = hf_config(case_config(case)), []
    model, params = build_model(cfg), abstract_params(cfg, "fp32")

    def attend(layer, q, k, v, *sinks):
        calls.append((layer, q.shape, k.shape, v.shape, q.dtype, k.dtype, v.dtype))
        return q

    eight = jax.ShapeDtypeStruct((8,), jnp.int32)
    hidden = jax.eval_shape(lambda p, t: model.apply({"params": p}, t, t, attend), params, eight)
    q, kv = (8, cfg.num_heads, cfg.head_dim), (8, cfg.num_kv_heads, cfg.head_dim)
    assert calls == [(layer, q, kv, kv, *[jnp.float32] * 3) for layer in range(cfg.num_layers)]
    assert (hidden.shape, hidden.dtype) == ((8, cfg.hidden_size), jnp.float32)


@pytest.mark.parametrize("weights", WEIGHT_RECIPES)
def test_packed_parameters_have_the_declared_shapes(case, weights):
    config = hf_config(case_config(case))
    declared = jax.tree.map(lambda s: (s.shape, s.dtype), abstract_params(config, weights))
    packed = jax.tree.map(lambda a: (a.shape, a.dtype), random_params(config, weights))
    assert packed == declared


def test_random_parameters_depend_on_the_seed_only():
    config = hf_config(case_config("qwen3"))
    first, again, other = (random_params(config, "int8", seed)["layers_1"] for seed in (1, 1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert not np.array_equal(first["mlp"]["down"]["kernel"], other["mlp"]["down"]["kernel"])
