"""Cohere's Command R7B and Command A: attention and MLP side by side on one LayerNorm, and a logit scale.

Layers with a window have RoPE, over neighbouring values; every fourth layer attends to all and has none.
"""

from __future__ import annotations

from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.family import Family, GGUFKeys, HFConfig
from fineserve_jax.models.layer_types import FULL, pattern_types, periodic_types, window_traits
from fineserve_jax.models.tensor_layout import TensorLayout

WINDOW_PERIOD = 4
BLOCK = {"norm": "layer", "parallel": True}


def _traits(config: HFConfig) -> dict[str, Any]:
    biased, layers = bool(config.get("attention_bias", False)), int(config["num_hidden_layers"])
    period, beside = config.get("sliding_window_pattern", WINDOW_PERIOD), config.get("layer_switch")
    if beside not in (None, period):
        raise ModelLoadError(f"config.json: layer_switch is {beside}, and sliding_window_pattern {period}; they differ")
    types = config.get("layer_types") or periodic_types(layers, period)
    return {
        **BLOCK,
        "qkv_bias": biased,
        "o_bias": biased,
        "norm_eps": config["layer_norm_eps"],
        "logit_multiplier": config["logit_scale"],
        "no_rope_layers": tuple(layer for layer, kind in enumerate(types) if kind == FULL),
        **window_traits(types, layers, config["sliding_window"]),
    }


def _gguf_keys(keys: GGUFKeys) -> dict[str, Any]:
    types = pattern_types(keys["block_count"], keys["attention.sliding_window_pattern"])
    return {
        "logit_multiplier": keys["logit_scale"],
        "no_rope_layers": tuple(layer for layer, kind in enumerate(types) if kind == FULL),
    }


FAMILY = Family(
    name="cohere2",
    hf_architectures=("Cohere2ForCausalLM",),
    gguf_architectures=("cohere2",),
    hf_defaults={
        "max_position_embeddings": 8192,
        "layer_norm_eps": 1e-5,
        "logit_scale": 0.0625,
        "sliding_window": 4096,
        "tie_word_embeddings": True,
    },
    hf_neutral={
        "order_of_interleaved_layers": ("local_attn_first",),
        "position_embedding_type": ("rope_gptj",),
        "rotary_pct": (1.0,),
        "use_embedding_sharing": (True,),
        "use_gated_activation": (True,),
        "use_parallel_block": (True,),
        "use_parallel_embedding": (True, False),  # of how the training was spread
    },
    traits=_traits,
    gguf_traits=BLOCK,
    gguf_keys=_gguf_keys,
    gguf_defaults={"attention.sliding_window_pattern": WINDOW_PERIOD},
    hf_layout=TensorLayout(interleaved_rope=True),
    gguf_layout=TensorLayout(interleaved_rope=True),
)
