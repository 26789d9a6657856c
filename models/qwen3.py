"""Qwen3: Llama with RMSNorm on the heads of q and k, and a head size of its own."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.qwen2 import qwen_windows


def _traits(config: HFConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return {"qk_norm": True, "qkv_bias": biased, "o_bias": biased, **qwen_windows(config)}


FAMILY = Family(
    name="qwen3",
    hf_architectures=("Qwen3ForCausalLM",),
    gguf_architectures=("qwen3",),
    hf_defaults={"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
    traits=_traits,
    gguf_traits={"qk_norm": True},
)
