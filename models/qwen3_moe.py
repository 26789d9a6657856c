"""Qwen3's mixtures of experts: Qwen3 with experts in all layers but those that a configuration names."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import window_of_all
from fineserve_jax.models.model_config import ExpertsConfig
from fineserve_jax.models.tensor_layout import STACKED_EXPERTS, TensorLayout


def _experts(config: HFConfig) -> ExpertsConfig | None:
    count, beside = config.get("num_experts"), config.get("num_local_experts")
    step, named = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or ()
    layers = range(config["num_hidden_layers"])
    return ExpertsConfig(
        count=count or beside or 128,
        used=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        normalised=bool(config.get("norm_topk_prob", False)),
        dense_layers=tuple(layer for layer in layers if layer in named or (layer + 1) % step),
    )


def _windows(config: HFConfig) -> dict[str, Any]:
    """All layers have the window if it is used; if not, what else is said of windows means nothing."""
    if config.get("use_sliding_window", False):
        return window_of_all(config)
    for key in ("sliding_window", "max_window_layers"):
        config.get(key)
    return {"sliding_window": None}


def _traits(config: HFConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return {
        "qk_norm": True,
        "qkv_bias": biased,
        "o_bias": biased,
        "experts": _experts(config),
        **_windows(config),
    }


FAMILY = Family(
    name="qwen3_moe",
    hf_architectures=("Qwen3MoeForCausalLM",),
    gguf_architectures=("qwen3moe",),
    hf_defaults={
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    traits=_traits,
    gguf_traits={"qk_norm": True},
    hf_layout=TensorLayout(joined=STACKED_EXPERTS),
)
