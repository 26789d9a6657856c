"""Gemma 2: norms on both sides of attention and MLP, soft caps, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, GGUFKeys, HFConfig
from fineserve_jax.models.layer_types import periodic_types, window_traits
from fineserve_jax.models.tensor_layout import GGUF_WITH_POST_NORMS

GGUF_TRAITS = {"post_norms": True, "activation": "gelu_tanh"}
WINDOW_PERIOD = 2  # every second layer attends to all
_LARGEST_LAYERS = 46  # of the one size whose queries are not scaled by the head size


def gemma_traits(config: HFConfig, window_period: int) -> dict[str, Any]:
    """What Gemma 2 and 3 have in common."""
    biased, layers = bool(config["attention_bias"]), int(config["num_hidden_layers"])
    period = int(config.get("sliding_window_pattern", window_period))
    types = config.get("layer_types") or periodic_types(layers, period)
    return {
        "post_norms": True,
        "qkv_bias": biased,
        "o_bias": biased,
        "embedding_multiplier": float(config["hidden_size"]) ** 0.5,
        "attention_multiplier": float(config["query_pre_attn_scalar"]) ** -0.5,
        "logit_soft_cap": config.get("final_logit_softcapping") or None,
        **window_traits(types, layers, config["sliding_window"]),
    }


def gemma_gguf_keys(keys: GGUFKeys, largest_layers: int) -> dict[str, Any]:
    """Files do not say how queries are scaled: llama.cpp tells it from the number of layers."""
    hidden, heads = keys["embedding_length"], keys["attention.head_count"]
    by_head = keys["block_count"] != largest_layers
    scaled_by = keys.get("attention.key_length", hidden // heads) if by_head else hidden / heads
    return {
        "embedding_multiplier": float(hidden) ** 0.5,
        "attention_multiplier": float(scaled_by) ** -0.5,
        "logit_soft_cap": keys.get("final_logit_softcapping", 0.0) or None,
    }


def _traits(config: HFConfig) -> dict[str, Any]:
    cap = config.get("attn_logit_softcapping") or None
    return {**gemma_traits(config, WINDOW_PERIOD), "attention_soft_cap": cap}


def _gguf_keys(keys: GGUFKeys) -> dict[str, Any]:
    cap = keys.get("attn_logit_softcapping", 0.0) or None
    return {**gemma_gguf_keys(keys, _LARGEST_LAYERS), "attention_soft_cap": cap}


FAMILY = Family(
    name="gemma2",
    hf_architectures=("Gemma2ForCausalLM",),
    gguf_architectures=("gemma2",),
    hf_defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "final_logit_softcapping": 30.0,
        "attn_logit_softcapping": 50.0,
    },
    traits=_traits,
    gguf_traits=GGUF_TRAITS,
    gguf_keys=_gguf_keys,
    hf_norm_offset=1.0,
    gguf_layout=GGUF_WITH_POST_NORMS,
    gguf_defaults={"attention.sliding_window": 4096, "attention.sliding_window_pattern": WINDOW_PERIOD},
)
