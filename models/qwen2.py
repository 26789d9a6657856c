"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.family import Family, HFConfig


def sliding_window(config: HFConfig) -> int | None:
    """The window all layers use, None for none; raises ModelLoadError where only some layers have one."""
    if not config.get("use_sliding_window", False) or config.get("sliding_window", 4096) is None:
        return None
    layers, full = int(config["num_hidden_layers"]), int(config.get("max_window_layers", 28))
    if full >= layers:
        return None
    if full > 0:
        raise ModelLoadError(
            f"config.json gives a sliding window to layers {full} to {layers - 1} only, which is "
            f"not supported; "
            "set use_sliding_window to false to attend to the whole context"
        )
    return int(config.get("sliding_window", 4096))


def _traits(config: HFConfig) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_window": sliding_window(config)}


FAMILY = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    gguf_architectures=("qwen2",),
    hf_defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    traits=_traits,
)
