"""Mistral: Llama with an optional sliding window, in every layer or, with `layer_types`, in some.

Its GGUF files call themselves `llama` and load as such.
"""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import window_of_all


def _traits(config: HFConfig) -> dict[str, Any]:
    return window_of_all(config)


FAMILY = Family(
    name="mistral",
    hf_architectures=("MistralForCausalLM",),
    gguf_architectures=(),
    hf_defaults={"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    traits=_traits,
)
