"""What each device has of a model's parameters: together they are the whole, and what cannot be divided is refused."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fineserve_jax.errors import ConfigError
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import (
    ModelConfig,
    build_model,
    pack_params,
    random_params,
    register_family,
    registry,
)
from fineserve_jax.models.model_config import ExpertsConfig
from fineserve_jax.models.sharding import COLUMNS, ROWS, WHOLE, check_shards, param_specs, shard_of
from fineserve_jax.models.transformer import CausalLM
from fineserve_jax.models.weight_formats import INT4_GROUP, WEIGHT_RECIPES, weight_recipe

FIXTURES = Path(__file__).parents[1] / "fixtures"
WEIGHTS = list(WEIGHT_RECIPES)
CONFIG = ModelConfig(
    "llama",
    vocab_size=101,
    hidden_size=64,
    num_layers=1,
    num_heads=8,
    num_kv_heads=4,
    head_dim=64,
    intermediate_size=512,
)


def host(params):
    return jax.tree.map(np.asarray, params)


def values(fmt, stored) -> np.ndarray:
    """The matrix that arrays of a weight format stand for."""
    stored = {name: jnp.asarray(array) for name, array in stored.items() if name != "bias"}
    return np.asarray(fmt.rows(stored, jnp.arange(len(stored["kernel"]))))


@pytest.mark.parametrize("weights", WEIGHTS)
@settings(max_examples=6)
@given(data=st.data())
def test_columns_of_a_stored_matrix_are_those_of_the_matrix(weights, data):
    fmt = weight_recipe(weights).linear
    unit = 2 * INT4_GROUP
    width = data.draw(st.integers(1, 6))
    first = data.draw(st.integers(0, width - 1))
    last = data.draw(st.integers(first + 1, width))
    matrix = np.random.default_rng(width).standard_normal((5, unit * width), np.float32)
    stored, own = fmt.pack(matrix), slice(first * unit, last * unit)
    part = fmt.columns(stored, own)
    assert {k: (v.shape, v.dtype) for k, v in part.items()} == {
        k: (v.shape, v.dtype) for k, v in fmt.declare(5, own.stop - own.start).items()
    }
    np.testing.assert_array_equal(values(fmt, part), values(fmt, stored)[:, own])


def matrices(params, name: str) -> np.ndarray:
    return params["layers_0"][name.split("/")[0]][name.split("/")[1]]


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shards", [2, 4, 8])
def test_each_device_has_its_heads_and_its_part_of_the_mlp_and_of_the_vocabulary(weights, shards):
    """Row by row against the whole matrices; with 8 devices two have the same KV head."""
    recipe, cfg = weight_recipe(weights), CONFIG
    params = host(random_params(cfg, weights))
    whole = {
        name: values(recipe.linear, matrices(params, name))
        for name in ("attn/qkv", "attn/o", "mlp/gate_up", "mlp/down")
    }
    q, k, v = np.split(whole["attn/qkv"], np.cumsum(cfg.qkv_sizes)[:2])
    gate, up = np.split(whole["mlp/gate_up"], 2)
    heads, width, inner = cfg.num_heads // shards, cfg.head_dim, cfg.intermediate_size // shards
    tables = {"embed": recipe.embedding, "lm_head": recipe.head}
    found = {name: [] for name in tables}
    for i in range(shards):
        own = {name: shard_of(cfg, weights, shards, i, name, tree) for name, tree in params.items()}
        local = {name: values(recipe.linear, matrices(own, name)) for name in whole}
        kv = [i * cfg.num_kv_heads // shards + n for n in range(max(1, cfg.num_kv_heads // shards))]
        own_q = slice(i * heads * width, (i + 1) * heads * width)
        own_kv = np.concatenate([np.arange(width) + head * width for head in kv])
        np.testing.assert_array_equal(local["attn/qkv"], np.concatenate([q[own_q], k[own_kv], v[own_kv]]))
        np.testing.assert_array_equal(local["attn/o"], whole["attn/o"][:, own_q])
        own_inner = slice(i * inner, (i + 1) * inner)
        np.testing.assert_array_equal(local["mlp/gate_up"], np.concatenate([gate[own_inner], up[own_inner]]))
        np.testing.assert_array_equal(local["mlp/down"], whole["mlp/down"][:, own_inner])
        for name, fmt in tables.items():
            found[name].append(values(fmt, own[name]))
    for name, fmt in tables.items():
        rows = np.concatenate(found[name])
        np.testing.assert_array_equal(rows[:101], values(fmt, params[name]))
        assert not rows[101:].any()
        assert len(rows) == shards * -(-101 // shards)


@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "olmo2", "cohere2", "gemma3", "qwen2", "llama_biases"])
def test_shards_have_the_shapes_that_the_model_of_a_device_declares(case):
    """And their specs say along which axis they differ: the others are whole."""
    source = HFModel(FIXTURES / case)
    cfg, shards = source.config, 3 if case == "gpt_oss" else 2
    if case == "gpt_oss":  # whose 3 experts 2 devices cannot share
        cfg = dataclasses.replace(cfg, num_heads=3, num_kv_heads=1)
        params = host(random_params(cfg, "int8"))
    else:
        params = host(pack_params(cfg, "int8", source))
    module = build_model(cfg, "int8", shards)
    parts = [{n: shard_of(cfg, "int8", shards, i, n, tree) for n, tree in params.items()} for i in range(shards)]
    specs = param_specs(cfg, params)
    mesh = jax.sharding.AbstractMesh((shards,), ("fineserve_shards",))
    declare = jax.shard_map(
        lambda: module.init(jax.random.key(0), jnp.zeros(1, jnp.int32), jnp.zeros(1, jnp.int32), method="declare"),
        mesh=mesh,
        in_specs=(),
        out_specs=WHOLE,
        check_vma=False,
    )
    declared = jax.eval_shape(declare)["params"]
    assert jax.tree.map(lambda a: (a.shape, a.dtype), declared) == jax.tree.map(lambda a: (a.shape, a.dtype), parts[0])
    flat = jax.tree.leaves_with_path(specs, is_leaf=lambda spec: spec in (ROWS, COLUMNS, WHOLE))
    for path, spec in flat:
        own = [_at(part, path) for part in parts]
        same = all(np.array_equal(own[0], other) for other in own[1:])
        assert same == (spec == WHOLE) or not own[0].any(), (path, spec)


def _at(tree, path):
    for key in path:
        tree = tree[key.key]
    return tree


@pytest.mark.parametrize(
    ("shards", "changes", "weights", "says"),
    [
        (3, {}, "fp32", r"tensor_parallel=3: the model has 8 query heads.*use one of tensor_parallel=1, 2, 4, 8"),
        (
            4,
            {"num_heads": 12, "num_kv_heads": 6, "intermediate_size": 384},
            "fp32",
            r"6 KV heads, which 4.*=1, 2, 3, 6",
        ),
        (4, {"intermediate_size": 66}, "fp32", "the model's MLP is 66 wide, which 4 devices"),
        (4, {"experts": ExpertsConfig(6, 2, 32)}, "fp32", "the model has 6 experts, which 4 devices"),
        (8, {"head_dim": 32}, "int4", r"divisible by 64, this model has one of 32.*each device's shard.*=1, 2, 4$"),
        (16, {}, "bf16", "8 query heads, which 16 devices"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_what_can_be(shards, changes, weights, says):
    with pytest.raises(ConfigError, match=says):
        check_shards(dataclasses.replace(CONFIG, **changes), weights, shards)


def test_a_family_with_a_computation_of_its_own_is_refused(monkeypatch):
    class Own(CausalLM):
        pass

    monkeypatch.setattr(registry, "_families", dict(registry._families))
    register_family(dataclasses.replace(registry.get_family("llama"), name="own", module=Own))
    check_shards(CONFIG, "fp32", 2)
    with pytest.raises(ConfigError, match=r"family 'own' has a computation of its own.*use one of tensor_parallel=1$"):
        check_shards(dataclasses.replace(CONFIG, family="own"), "fp32", 2)


def test_nothing_is_read_of_a_model_that_is_refused():
    class Refusing:
        def check(self, config, weights):
            raise ConfigError("not here")

    class Unread(HFModel):
        def read(self, name, rows=None):
            raise AssertionError("read although refused")

    with pytest.raises(ConfigError, match="not here"):
        pack_params(CONFIG, "fp32", Unread(FIXTURES / "llama"), Refusing())
