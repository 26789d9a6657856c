"""Gemma 3, and the text part of its multimodal models: Gemma 2 with norms of q and k in the place of soft caps.

Five of six layers have a window, and a RoPE of their own.
"""

from __future__ import annotations

from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.family import Family, GGUFKeys, HFConfig
from fineserve_jax.models.gemma2 import FAMILY as GEMMA2
from fineserve_jax.models.gemma2 import GGUF_TRAITS, gemma_gguf_keys, gemma_traits
from fineserve_jax.models.tensor_layout import GGUF_WITH_POST_NORMS

WINDOW_PERIOD = 6
LOCAL_ROPE_THETA = 10000.0
_LARGEST_LAYERS = 62


def _traits(config: HFConfig) -> dict[str, Any]:
    if config.get("attn_logit_softcapping"):
        raise ModelLoadError("config.json: attn_logit_softcapping is not supported in Gemma 3, which has none")
    local = config.get("rope_local_base_freq", LOCAL_ROPE_THETA)
    return {"local_rope_theta": local, **gemma_traits(config, WINDOW_PERIOD), "qk_norm": True}


def _gguf_keys(keys: GGUFKeys) -> dict[str, Any]:
    return {"local_rope_theta": keys["rope.freq_base_swa"], **gemma_gguf_keys(keys, _LARGEST_LAYERS)}


FAMILY = Family(
    name="gemma3",
    hf_architectures=("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"),
    gguf_architectures=("gemma3",),
    hf_defaults={
        **GEMMA2.hf_defaults,
        "vocab_size": 262208,
        "max_position_embeddings": 131072,
        "rope_theta": 1000000.0,
        "final_logit_softcapping": None,
        "attn_logit_softcapping": None,
    },
    traits=_traits,
    gguf_traits={**GGUF_TRAITS, "qk_norm": True},
    gguf_keys=_gguf_keys,
    hf_norm_offset=1.0,
    gguf_layout=GGUF_WITH_POST_NORMS,
    local_rope=True,
    gguf_defaults={"attention.sliding_window_pattern": WINDOW_PERIOD, "rope.freq_base_swa": LOCAL_ROPE_THETA},
)
