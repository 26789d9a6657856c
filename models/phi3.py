"""Phi-3 and Phi-4: Llama with fused projections, and in some RoPE over a part of each head, and LongRoPE."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import window_of_all
from fineserve_jax.models.tensor_layout import FUSED_GATE_UP, FUSED_QKV, Joined, TensorLayout


def _traits(config: HFConfig) -> dict[str, Any]:
    return window_of_all(config)


FAMILY = Family(
    name="phi3",
    hf_architectures=("Phi3ForCausalLM",),
    gguf_architectures=("phi3",),
    hf_defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    traits=_traits,
    gguf_defaults={"attention.sliding_window_pattern": 0},  # a window is that of every layer
    partial_rotary=True,
    hf_layout=TensorLayout(joined=(FUSED_QKV, FUSED_GATE_UP)),
    gguf_layout=TensorLayout(
        joined=(Joined("attn_qkv", FUSED_QKV.parts), Joined("ffn_up", FUSED_GATE_UP.parts)),
    ),
)
