"""Mistral: Llama with an optional sliding window. Its GGUF files call themselves `llama` and load as such."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig


def _traits(config: HFConfig) -> dict[str, Any]:
    return {"sliding_window": config.get("sliding_window", 4096)}


FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    gguf_architectures=(),
    hf_defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072},
    traits=_traits,
)
