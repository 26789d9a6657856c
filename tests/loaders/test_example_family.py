"""The model family of the example reads checkpoints as it says: Qwen2's, under other names and with q, k, v as one."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from example_modules import EXAMPLES, example
from safetensors.numpy import load_file, save_file

from fineserve_jax import ModelLoadError, register_model_family
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import pack_params, registry

FIXTURE = EXAMPLES.parent / "tests" / "fixtures" / "qwen2"
OF_WINDOWS = ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types")


@pytest.fixture
def renamed(tmp_path, monkeypatch):
    """A checkpoint of the family; registered families are those of before when the test ends."""
    monkeypatch.setattr(registry, "_families", dict(registry._families))
    config = json.loads((FIXTURE / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in OF_WINDOWS}
    config |= {"architectures": ["StarlingForCausalLM"], "model_type": "starling", "use_bias": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    tensors = load_file(FIXTURE / "model.safetensors")
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for kind in ("weight", "bias"):
            parts = [tensors.pop(f"{prefix}self_attn.{part}_proj.{kind}") for part in "qkv"]
            tensors[f"{prefix}attention.qkv.{kind}"] = np.concatenate(parts)
        tensors[f"{prefix}attention.out.weight"] = tensors.pop(f"{prefix}self_attn.o_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


def test_a_checkpoint_of_the_examples_family_is_loaded_as_the_one_that_it_was_made_of(renamed):
    with pytest.raises(ModelLoadError, match="'StarlingForCausalLM' is not supported"):
        HFModel(renamed)
    register_model_family(example("add_model_family").FAMILY)
    found, original = HFModel(renamed), HFModel(FIXTURE)
    assert found.config == dataclasses.replace(original.config, family="starling")
    own, expected = (pack_params(source.config, "fp32", source) for source in (found, original))
    assert jax.tree.structure(own) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, own, expected)
