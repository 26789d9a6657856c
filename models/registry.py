"""Families by name, and by the names checkpoints give them.

`register_family` adds one from outside; a package can offer one as an entry point of `fineserve_jax.model_families`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.metadata import entry_points

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models import (
    cohere2,
    gemma2,
    gemma3,
    gpt_oss,
    granite,
    llama,
    mistral,
    mixtral,
    olmo2,
    olmo3,
    phi3,
    qwen2,
    qwen3,
    qwen3_moe,
    smollm3,
)
from fineserve_jax.models.family import Family
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.transformer import CausalLM
from fineserve_jax.models.weight_formats import weight_recipe

ENTRY_POINTS = "fineserve_jax.model_families"

_families: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known; a family of the same name is replaced."""
    _families[family.name] = family


def get_family(name: str) -> Family:
    """The family called `name`; raises ModelLoadError naming the known ones."""
    if name not in _families:
        _register_offered()
    if name not in _families:
        raise ModelLoadError(f"model family {name!r} is not known; known: {', '.join(sorted(_families))}")
    return _families[name]


def families() -> list[Family]:
    """All that are registered, in that order; those that installed packages offer only once they were asked for."""
    return list(_families.values())


def family_of_hf_architecture(architecture: str) -> Family:
    """The family of an entry of `architectures` in config.json; raises ModelLoadError."""
    return _find(architecture, lambda family: family.hf_architectures)


def family_of_gguf_architecture(architecture: str) -> Family:
    """The family of a GGUF file's `general.architecture`; raises ModelLoadError."""
    return _find(architecture, lambda family: family.gguf_architectures)


def build_model(config: ModelConfig, weights: str = "fp32", shards: int = 1) -> CausalLM:
    """The Flax module of `config.family` with matrices stored as `weights` says; raises ModelLoadError.

    shards: how many devices compute the model together, see `CausalLM`.
    """
    weight_recipe(weights)
    module = get_family(config.family).module
    return module(config, weights) if shards == 1 else module(config, weights, shards)


def _find(architecture: str, names_of: Callable[[Family], Iterable[str]]) -> Family:
    def table() -> dict[str, Family]:
        return {name: family for family in _families.values() for name in names_of(family)}

    if architecture not in table():
        _register_offered()
    if architecture not in table():
        known = ", ".join(sorted(table()))
        raise ModelLoadError(f"architecture {architecture!r} is not supported; supported: {known}")
    return table()[architecture]


def _register_offered() -> None:
    """Makes the families known that installed packages offer. Those that are known already are left as they are."""
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name not in _families:
            family = entry.load()
            if not isinstance(family, Family):
                raise ModelLoadError(
                    f"the entry point {entry.name!r} of {ENTRY_POINTS} is {family!r}, which is no Family"
                )
            register_family(family)


_DENSE = (llama, mistral, qwen2, qwen3, gemma2, gemma3, granite, phi3, olmo2, olmo3, smollm3, cohere2)
for _module in (*_DENSE, mixtral, qwen3_moe, gpt_oss):
    register_family(_module.FAMILY)
