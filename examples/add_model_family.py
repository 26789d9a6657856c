"""Adds a model family: checkpoints like Qwen2's, whose q, k and v are one tensor under another name.

    python examples/add_model_family.py DIRECTORY PROMPT

A family is data: how its `config.json` maps to `ModelConfig`, and how its files name and join tensors where that
differs from Llama's way. What it computes is chosen by the fields of `ModelConfig`, here biases of q, k and v. A
package can offer families in the entry point group `fineserve_jax.model_families`: they are looked at when a checkpoint
names an architecture that nothing else bears.
"""

import sys
from collections.abc import Mapping
from typing import Any

from fineserve_jax import LLM, JoinedTensors, ModelFamily, SamplingParams, TensorLayout, register_model_family

QKV = JoinedTensors("attention.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"))


def traits(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of `ModelConfig` that follow from config.json in this family's own way."""
    return {"qkv_bias": bool(config.get("use_bias", True))}


FAMILY = ModelFamily(
    name="starling",
    hf_architectures=("StarlingForCausalLM",),
    gguf_architectures=(),  # there are no such files
    hf_defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},  # of keys that are left out
    traits=traits,
    hf_layout=TensorLayout(names={"self_attn.o_proj": "attention.out"}, joined=(QKV,)),
)


def main(directory: str, prompt: str) -> None:
    register_model_family(FAMILY)
    llm = LLM(directory, kv_memory="128MiB", max_batch_size=1, max_seq_len=512)
    print(llm.generate([prompt], SamplingParams(max_tokens=32))[0].outputs[0].text)


if __name__ == "__main__":
    main(*sys.argv[1:])
