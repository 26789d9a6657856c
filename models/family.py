"""What a model family declares about itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from fineserve_jax.models.tensor_layout import AS_LLAMA, TensorLayout
from fineserve_jax.models.transformer import CausalLM

HFConfig = Mapping[str, Any]
"""A parsed Hugging Face `config.json`."""
GGUFKeys = Mapping[str, Any]
"""A GGUF file's metadata under the architecture's name, without that prefix."""


def no_keys(keys: GGUFKeys) -> dict[str, Any]:
    """Nothing follows in a family's own way."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """A group of checkpoints that share tensor names and one definition.

    name: what `ModelConfig.family` holds.
    hf_architectures: values of `architectures` in config.json.
    gguf_architectures: values of `general.architecture` in a GGUF file.
    hf_defaults: what this family's config.json means by a key it leaves out.
    hf_neutral: values at which further keys of this family's config.json change nothing.
    traits: fields of `ModelConfig` that follow from config.json in this family's own way.
    gguf_traits: fields of `ModelConfig` that hold for every GGUF file of this family; its tensors are then required.
    hf_norm_offset: what Hugging Face checkpoints leave out of the weights of norms; GGUF files have it in them.
    local_rope: whether config.json may give layers with a window a RoPE of their own, beside `full_attention`'s.
    gguf_defaults: what this family's GGUF files mean by a key of the architecture that they leave out.
    gguf_keys: fields of `ModelConfig` that follow from GGUF metadata in this family's own way.
    yarn_truncates: whether yarn rounds its band to whole dimensions in its GGUF files, which do not say.
    partial_rotary: whether its configurations may have RoPE turn a part of each head only.
    hf_layout, gguf_layout: how its files name and join its tensors.
    module: the Flax module, built as `module(config, weights)`.
    """

    name: str
    hf_architectures: tuple[str, ...]
    gguf_architectures: tuple[str, ...]
    hf_defaults: Mapping[str, Any]
    traits: Callable[[HFConfig], dict[str, Any]]
    hf_neutral: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    gguf_traits: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    hf_norm_offset: float = 0.0
    local_rope: bool = False
    gguf_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    gguf_keys: Callable[[GGUFKeys], dict[str, Any]] = no_keys
    yarn_truncates: bool = True
    partial_rotary: bool = False
    hf_layout: TensorLayout = AS_LLAMA
    gguf_layout: TensorLayout = AS_LLAMA
    module: type[CausalLM] = CausalLM
