"""GGUF names of tensors: what llama.cpp's converter calls the parts of a model."""

from __future__ import annotations

from fineserve_jax.models.tensor_layout import Joined

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.sinks": "attn_sinks",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate.*",  # files of before stacks
    "mlp.experts.*.up_proj": "ffn_up.*",
    "mlp.experts.*.down_proj": "ffn_down.*",
}
STACKS = (
    Joined("ffn_gate_exps", ("mlp.experts.*.gate_proj",)),
    Joined("ffn_up_exps", ("mlp.experts.*.up_proj",)),
    Joined("ffn_down_exps", ("mlp.experts.*.down_proj",)),
)


def gguf_name(prefix: str, part: str, kind: str, stacked: bool = False) -> str:
    """("model.layers.3.", "ffn_up", "weight") -> "blk.3.ffn_up.weight". Whether it is a stack of experts shows in the
    part's name already."""
    return f"{prefix.replace('model.layers', 'blk')}{part}.{kind or 'weight'}"
