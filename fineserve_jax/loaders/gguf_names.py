"""GGUF names of tensors, from their Hugging Face names."""

from __future__ import annotations

import re

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LAYER_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
_SINKS_PATTERN = re.compile(r"model\.layers\.(\d+)\.self_attn\.sinks")


def gguf_tensor_name(name: str, post_norms: bool = False) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`.

    post_norms: whether the model has norms after attention. Llama calls what is ahead of the MLP as others do those.
    """
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    if sinks := _SINKS_PATTERN.fullmatch(name):
        return f"blk.{sinks[1]}.attn_sinks.weight"
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise KeyError(f"no GGUF name is known for tensor {name}")
    if post_norms and match[2] == "post_attention_layernorm":
        return f"blk.{match[1]}.post_attention_norm.{match[3]}"
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"
