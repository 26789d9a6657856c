"""Mixtures of experts: each token goes through its own experts, and through no others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_weight_formats import FORMATS, decode

from fineserve_jax.models import ModelConfig
from fineserve_jax.models.experts import Experts, group_by_expert, route, tile_rows
from fineserve_jax.models.layers import gated
from fineserve_jax.models.model_config import ExpertsConfig
from fineserve_jax.models.params import random_params

HIDDEN, INNER = 64, 128
METHODS = (Experts.tile_by_tile, Experts.all_at_once)
# Products round activations, to bf16 twice or to 8 bits twice, relative to the largest value of a row.
ERROR = {"fp32": 1e-5, "bf16": 0.02, "int8": 0.05, "int4": 0.03}


def config(count=5, used=2, **more):
    experts = ExpertsConfig(count, used, INNER, **more)
    return ModelConfig("mixtral", 96, HIDDEN, 1, 4, 2, 16, 32, experts=experts)


def layer_params(cfg, weights, seed=0):
    return random_params(cfg, weights, seed, scale=0.2)["layers_0"]["mlp"]


def compute(cfg, weights, params, x):
    return np.asarray(jax.jit(lambda p, x: Experts(cfg, weights).apply({"params": p}, x))(params, jnp.asarray(x)))


def reference(cfg, weights, params, x):
    """Token by token, in float64, with the weights that are stored."""
    logits = x.astype(np.float64) @ np.asarray(params["router"]["kernel"], np.float64).T
    stored = {name: {k: np.asarray(v) for k, v in params[name].items()} for name in ("gate_up", "down")}
    out = np.zeros_like(x, np.float64)
    for token, row in enumerate(x.astype(np.float64)):
        chosen = np.argsort(-logits[token], kind="stable")[: cfg.experts.used]
        among = logits[token][chosen] if cfg.experts.normalised else logits[token]
        shares = np.exp(logits[token][chosen] - among.max()) / np.exp(among - among.max()).sum()
        for expert, share in zip(chosen, shares, strict=True):
            matrices = {n: decode(weights, {k: v[expert] for k, v in part.items()}) for n, part in stored.items()}
            gate, up = np.split(matrices["gate_up"] @ row, 2)
            out[token] += share * (matrices["down"] @ (gate / (1 + np.exp(-gate)) * up))
    return out


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("normalised", [True, False])
def test_experts_of_all_weight_formats_compute_what_each_token_s_own_experts_give(weights, normalised):
    cfg = config(normalised=normalised)
    params, x = layer_params(cfg, weights), np.random.default_rng(1).standard_normal((37, HIDDEN)).astype(np.float32)
    found, expected = compute(cfg, weights, params, x), reference(cfg, weights, params, x)
    assert np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)) < ERROR[weights]


@pytest.mark.parametrize("weights", ["fp32", "bf16", "int8"])
def test_grouped_products_for_tpus_give_what_tiles_give(weights):
    cfg = dataclasses.replace(config(count=4), mlp_bias=True)
    params, x = layer_params(cfg, weights), np.random.default_rng(5).standard_normal((21, HIDDEN)).astype(np.float32)
    _, chosen = route(cfg.experts, jnp.asarray(x @ np.asarray(params["router"]["kernel"]).T))
    groups = group_by_expert(chosen, 4)

    def both(params, x):
        return [Experts(cfg, weights).apply({"params": params}, x, groups, method=m) for m in METHODS]

    tiles, whole = (np.asarray(part) for part in jax.jit(both)(params, jnp.asarray(x)))
    np.testing.assert_allclose(whole, tiles, rtol=1e-3, atol=1e-3 * np.abs(tiles).max())


@pytest.mark.parametrize(("count", "used", "tokens"), [(1, 1, 3), (4, 4, 9), (40, 3, 1), (3, 1, 200)])
def test_any_number_of_experts_and_tokens(count, used, tokens):
    """More experts than pairs, all of them, one only, and more rows of one than a tile has."""
    cfg = config(count, used)
    params, x = layer_params(cfg, "fp32"), np.random.default_rng(2).standard_normal((tokens, HIDDEN)).astype(np.float32)
    if tokens > 100:  # nearly all go to one expert
        params["router"] = {"kernel": params["router"]["kernel"].at[1].set(params["router"]["kernel"][1] + 0.3)}
        x += 1.0
    expected = reference(cfg, "fp32", params, x)
    np.testing.assert_allclose(compute(cfg, "fp32", params, x), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_experts_that_no_token_has_chosen_are_not_evaluated():
    """Their weights are NaN: multiplied by anything they would show."""
    cfg = config(count=6)
    params = layer_params(cfg, "fp32")
    x = np.random.default_rng(3).standard_normal((50, HIDDEN)).astype(np.float32)
    _, chosen = route(cfg.experts, jnp.asarray(x @ np.asarray(params["router"]["kernel"]).T))
    x = x[[not {0, 4} & set(row) for row in np.asarray(chosen).tolist()]]
    assert len(x) > 3
    expected = compute(cfg, "fp32", params, x)
    spoilt = {n: {k: v.at[jnp.array([0, 4])].set(np.nan) for k, v in params[n].items()} for n in ("gate_up", "down")}
    np.testing.assert_array_equal(compute(cfg, "fp32", {**params, **spoilt}, x), expected)


@given(st.integers(1, 40), st.integers(1, 9), st.data())
@settings(max_examples=8)
def test_pairs_are_grouped_by_expert_in_the_order_of_tokens(tokens, count, data):
    used = data.draw(st.integers(1, count))
    seed = data.draw(st.integers(0, 2**32 - 1))
    rng = np.random.default_rng(seed)
    chosen = np.array([rng.permutation(count)[:used] for _ in range(tokens)], np.int32)
    groups = group_by_expert(jnp.asarray(chosen), count)
    order, sizes = np.asarray(groups.order), np.asarray(groups.sizes)
    np.testing.assert_array_equal(order, np.lexsort((np.arange(tokens * used), chosen.ravel())))
    np.testing.assert_array_equal(sizes, np.bincount(chosen.ravel(), minlength=count))
    assert 8 <= tile_rows(tokens * used, count) <= 64


def test_gates_are_clamped_and_joined_as_gpt_oss_does():
    cfg = dataclasses.replace(config(), gate_limit=1.5, gate_slope=1.7)
    gate, up = np.random.default_rng(4).standard_normal((2, 20, 8)) * 3
    clamped, linear = np.minimum(gate, 1.5), np.clip(up, -1.5, 1.5)
    expected = clamped / (1 + np.exp(-1.7 * clamped)) * (linear + 1)
    found = gated(cfg, jnp.asarray(gate, jnp.float32), jnp.asarray(up, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
