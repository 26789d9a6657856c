"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import FULL, SLIDING, window_traits


def qwen_windows(config: HFConfig) -> dict[str, Any]:
    """Which layers have a window: those of `layer_types`, or all from `max_window_layers` on."""
    layers, types = int(config["num_hidden_layers"]), config.get("layer_types")
    size, used = config.get("sliding_window", 4096), config.get("use_sliding_window", False)
    window, first = size if used else None, int(config.get("max_window_layers", 28))
    if types is None:
        types = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return window_traits(types, layers, window)


def _traits(config: HFConfig) -> dict[str, Any]:
    return {"qkv_bias": True, **qwen_windows(config)}


FAMILY = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    gguf_architectures=("qwen2",),
    hf_defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    traits=_traits,
    gguf_traits={"qkv_bias": True},
)
