"""Configurations, their limits, and the registry of families."""

import dataclasses
import json

import pytest
from model_oracle import CASES, case_config

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.models import CausalLM, ModelConfig, RopeScaling, build_model, get_family, register_family
from fineserve_jax.models.family import Family
from fineserve_jax.models.model_config import ExpertsConfig
from fineserve_jax.models.registry import family_of_gguf_architecture, family_of_hf_architecture

BASE = ModelConfig("llama", 96, 64, 2, 4, 2, 16, 64)


@pytest.mark.parametrize("case", CASES)
def test_a_configuration_survives_json(case):
    config = hf_config(case_config(case))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(dataclasses.replace(config))


def test_rope_factors_survive_json():
    config = dataclasses.replace(BASE, rope_scaling=RopeScaling("factors", factors=(1.0, 2.0) * 4))
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_layers": 0}, "num_layers is 0"),
        ({"num_kv_heads": 3}, "4 query heads cannot share 3 KV heads"),
        ({"head_dim": 15}, "head_dim is 15"),
        ({"rotary_dim": 18}, "head_dim is 16, of which RoPE turns 18 values"),
        ({"logit_multiplier": 0.0}, "logit_multiplier is 0.0, must be a positive number"),
        ({"no_rope_layers": (2,)}, r"no_rope_layers are \[2\]; they must be ascending numbers of 2 layers"),
        ({"experts": ExpertsConfig(2**15 + 1, 1, 8)}, "2 layers of 32769 experts; at most 65536"),
        ({"rope_scaling": RopeScaling("factors", factors=(1.0, 2.0))}, "2 RoPE factors.*expected 8"),
    ],
)
def test_impossible_configurations_are_refused(change, message):
    with pytest.raises(ModelLoadError, match=message):
        dataclasses.replace(BASE, **change)


def test_unknown_rope_scaling_is_refused_by_name():
    with pytest.raises(ModelLoadError, match=r"'dynamic' is not supported; supported: linear, llama3, yarn"):
        RopeScaling("dynamic")


def test_a_token_cannot_use_more_experts_than_there_are():
    with pytest.raises(ModelLoadError, match=r"cannot use 3 of 2 experts"):
        ExpertsConfig(2, 3, 8)


def test_rope_scaling_without_the_original_context_is_refused():
    with pytest.raises(ModelLoadError, match=r"original context length"):
        RopeScaling("llama3", factor=8.0)


def test_a_stored_configuration_with_a_field_of_another_version_is_refused():
    with pytest.raises(ModelLoadError, match=r"does not fit this version"):
        ModelConfig.from_dict({**BASE.to_dict(), "flux": 1})


def test_attention_scale_is_one_over_the_root_of_head_dim():
    assert BASE.attention_scale == 0.25


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_families_are_found_by_their_checkpoint_names(name):
    family = get_family(name)
    for architecture in family.hf_architectures:
        assert family_of_hf_architecture(architecture) is family
    for architecture in family.gguf_architectures:
        assert family_of_gguf_architecture(architecture) is family


def test_unknown_architectures_are_refused_with_the_supported_ones():
    with pytest.raises(ModelLoadError, match=r"'GPT2LMHeadModel'.*LlamaForCausalLM.*Qwen3ForCausalLM"):
        family_of_hf_architecture("GPT2LMHeadModel")
    with pytest.raises(ModelLoadError, match=r"'gpt2'.*llama, olmo2, phi3, qwen2, qwen3"):
        family_of_gguf_architecture("gpt2")
    with pytest.raises(ModelLoadError, match=r"'nobody'.*llama, mistral"):
        build_model(dataclasses.replace(BASE, family="nobody"))


def test_a_family_from_outside_is_built_with_its_own_module(monkeypatch):
    class Own(CausalLM):
        pass

    monkeypatch.setattr("fineserve_jax.models.registry._families", {})
    register_family(Family("own", ("OwnForCausalLM",), ("own",), {}, lambda config: {}, module=Own))
    config = dataclasses.replace(BASE, family="own")
    assert isinstance(build_model(config, "int8"), Own)
    assert family_of_hf_architecture("OwnForCausalLM").name == "own"
