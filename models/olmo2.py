"""OLMo 2: norms behind attention and MLP instead of ahead of them, and of q and k over all heads together."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, GGUFKeys, HFConfig
from fineserve_jax.models.tensor_layout import GGUF_WITH_POST_NORMS

NORMS = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_across_heads": True}


def _traits(config: HFConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return {**NORMS, "qkv_bias": biased, "o_bias": biased}


def _gguf_keys(keys: GGUFKeys) -> dict[str, Any]:
    """OLMo 3's layers with a window have a RoPE that is not scaled."""
    base = keys.get("rope.freq_base_swa", keys.get("rope.freq_base", 10000.0))
    return {"local_rope_theta": base} if keys.get("attention.sliding_window", 0) else {}


FAMILY = Family(
    name="olmo2",
    hf_architectures=("Olmo2ForCausalLM",),
    gguf_architectures=("olmo2",),
    hf_defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    traits=_traits,
    gguf_traits=NORMS,
    gguf_keys=_gguf_keys,
    gguf_defaults={"attention.sliding_window_pattern": 4},
    gguf_layout=GGUF_WITH_POST_NORMS,
)
