"""Llama 2 and 3, SmolLM2 and everything else that calls itself LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.tensor_layout import TensorLayout


def _traits(config: HFConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return {"qkv_bias": biased, "o_bias": biased, "mlp_bias": bool(config.get("mlp_bias", False))}


FAMILY = Family(
    name="llama",
    hf_architectures=("LlamaForCausalLM",),
    gguf_architectures=("llama",),
    hf_defaults={"max_position_embeddings": 2048},
    traits=_traits,
    gguf_defaults={"attention.sliding_window_pattern": 0},  # Mistral's, too: a window is that of every layer
    gguf_layout=TensorLayout(interleaved_rope=True),
)
