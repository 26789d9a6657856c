"""How the files of a family name and join its tensors, where that differs from Llama's way.

Parts of a layer are called as in Llama's Hugging Face checkpoints, without the layer's prefix and the tensor's kind:
`self_attn.q_proj`. The parts of experts have a `*` for the expert's number: `mlp.experts.*.up_proj`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Joined:
    """A stored tensor that holds several parts of a layer.

    name: what the files call it, without the layer's prefix.
    parts: whose rows it holds, one part after the other. Where they are parts of experts, it has the experts along a
        first axis.
    alternating: the rows of the parts take turns instead.
    transposed: its matrices are `[in, out]`.
    """

    name: str
    parts: tuple[str, ...]
    alternating: bool = False
    transposed: bool = False


@dataclasses.dataclass(frozen=True)
class TensorLayout:
    """A family's tensors in one file format.

    names: part -> what the files call it. Files that have the usual name instead load as well.
    joined: tensors of several parts. Files that have the parts by themselves instead load as well.
    interleaved_rope: whether q and k have the rows of each head in the order in which RoPE turns neighbours, which is
        0, d/2, 1, d/2 + 1 ... of the order in which it turns halves.
    """

    names: Mapping[str, str] = dataclasses.field(default_factory=dict)
    joined: tuple[Joined, ...] = ()
    interleaved_rope: bool = False


AS_LLAMA = TensorLayout()
# Llama's checkpoints call what is ahead of the MLP as those of families with norms after attention call these.
GGUF_WITH_POST_NORMS = TensorLayout(names={"post_attention_layernorm": "post_attention_norm"})
FUSED_GATE_UP = Joined("mlp.gate_up_proj", ("mlp.gate_proj", "mlp.up_proj"))
FUSED_QKV = Joined("self_attn.qkv_proj", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))
STACKED_EXPERTS = (
    Joined("mlp.experts.gate_up_proj", ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")),
    Joined("mlp.experts.down_proj", ("mlp.experts.*.down_proj",)),
)
