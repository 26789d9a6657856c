"""OLMo 3: OLMo 2 in which three of four layers have a window. Their RoPE is not scaled, that of the others may be.

Its GGUF files call themselves `olmo2` and load as such.
"""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import periodic_types, window_traits
from fineserve_jax.models.olmo2 import NORMS

WINDOW_PERIOD = 4  # every fourth layer attends to all


def _traits(config: HFConfig) -> dict[str, Any]:
    biased, layers = bool(config.get("attention_bias", False)), int(config["num_hidden_layers"])
    types = config.get("layer_types") or periodic_types(layers, WINDOW_PERIOD)
    windows = window_traits(types, layers, config["sliding_window"])
    flat = (config.get("rope_parameters") or {}).get("rope_theta", config["rope_theta"])
    base = config.get("rope_local_base_freq", flat)
    local = {"local_rope_theta": base} if windows["sliding_window"] is not None else {}
    return {**NORMS, "qkv_bias": biased, "o_bias": biased, **windows, **local}


FAMILY = Family(
    name="olmo3",
    hf_architectures=("Olmo3ForCausalLM",),
    gguf_architectures=(),
    hf_defaults={
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "sliding_window": 4096,
    },
    traits=_traits,
    local_rope=True,
)
