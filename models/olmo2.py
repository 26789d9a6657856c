"""OLMo 2: norms behind attention and MLP instead of ahead of them, and of q and k over all heads together."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.tensor_layout import GGUF_WITH_POST_NORMS

SHAPE = {"pre_norms": False, "post_norms": True, "qk_norm": True, "qk_norm_across_heads": True}


def _traits(config: HFConfig) -> dict[str, Any]:
    biased = bool(config.get("attention_bias", False))
    return {**SHAPE, "qkv_bias": biased, "o_bias": biased}


FAMILY = Family(
    name="olmo2",
    hf_architectures=("Olmo2ForCausalLM",),
    gguf_architectures=("olmo2",),
    hf_defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    traits=_traits,
    gguf_traits=SHAPE,
    gguf_layout=GGUF_WITH_POST_NORMS,
)
