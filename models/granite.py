"""Granite 3: Llama with multipliers of the embedding, the attention's logits, the residual stream and the logits."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, GGUFKeys, HFConfig
from fineserve_jax.models.tensor_layout import TensorLayout


def _traits(config: HFConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return {
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "embedding_multiplier": config.get("embedding_multiplier", 1.0),
        "attention_multiplier": config.get("attention_multiplier", 1.0),
        "residual_multiplier": config.get("residual_multiplier", 1.0),
        "logit_multiplier": 1.0 / config.get("logits_scaling", 1.0),
    }


def _gguf_keys(keys: GGUFKeys) -> dict[str, Any]:
    """A scale of 0, as an absent one, means none; `logit_scale` divides."""
    return {
        "embedding_multiplier": keys.get("embedding_scale", 0.0) or 1.0,
        "attention_multiplier": keys.get("attention.scale", 0.0) or None,
        "residual_multiplier": keys.get("residual_scale", 0.0) or 1.0,
        "logit_multiplier": 1.0 / (keys.get("logit_scale", 0.0) or 1.0),
    }


FAMILY = Family(
    name="granite",
    hf_architectures=("GraniteForCausalLM",),
    gguf_architectures=("granite",),
    hf_defaults={"max_position_embeddings": 2048},
    traits=_traits,
    gguf_keys=_gguf_keys,
    gguf_layout=TensorLayout(interleaved_rope=True),
)
