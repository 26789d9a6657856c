"""Families by name, and by the names checkpoints give them. `register_family` adds one from outside."""

from __future__ import annotations

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models import llama, mistral, qwen2, qwen3
from fineserve_jax.models.family import Family
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.transformer import CausalLM
from fineserve_jax.models.weight_formats import weight_recipe

_families: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known; a family of the same name is replaced."""
    _families[family.name] = family


def get_family(name: str) -> Family:
    """The family called `name`; raises ModelLoadError naming the known ones."""
    if name not in _families:
        raise ModelLoadError(f"model family {name!r} is not known; known: {', '.join(sorted(_families))}")
    return _families[name]


def family_of_hf_architecture(architecture: str) -> Family:
    """The family of an entry of `architectures` in config.json; raises ModelLoadError."""
    return _find(architecture, {name: f for f in _families.values() for name in f.hf_architectures})


def family_of_gguf_architecture(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`; raises ModelLoadError."""
    return _find(architecture, {name: f for f in _families.values() for name in f.gguf_architectures})


def build_model(config: ModelConfig, weights: str = "fp32") -> CausalLM:
    """The Flax module of `config.family` with matrices stored as `weights` says; raises ModelLoadError."""
    weight_recipe(weights)
    return get_family(config.family).module(config, weights)


def _find(architecture: str, table: dict[str, Family]) -> Family:
    if architecture not in table:
        raise ModelLoadError(f"architecture {architecture!r} is not supported; supported: {', '.join(sorted(table))}")
    return table[architecture]


for _module in (llama, mistral, qwen2, qwen3):
    register_family(_module.FAMILY)
