"""SmolLM3: Llama in which every few layers have no RoPE."""

from __future__ import annotations

from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.family import Family, GGUFKeys, HFConfig
from fineserve_jax.models.layer_types import FULL, SLIDING, window_traits
from fineserve_jax.models.tensor_layout import TensorLayout

NO_ROPE_PERIOD = 4  # every fourth layer has none


def _traits(config: HFConfig) -> dict[str, Any]:
    biased, layers = bool(config.get("attention_bias", False)), int(config["num_hidden_layers"])
    without = _no_rope_layers(config, layers)
    window, used = config.get("sliding_window"), config.get("use_sliding_window", False)
    config.get("max_window_layers")  # Qwen's, and of no meaning here
    types = config.get("layer_types") or [SLIDING if used and layer in without else FULL for layer in range(layers)]
    return {
        "qkv_bias": biased,
        "o_bias": biased,
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "no_rope_layers": without,
        **window_traits(types, layers, window if used else None),
    }


def _no_rope_layers(config: HFConfig, num_layers: int) -> tuple[int, ...]:
    """A 1 in `no_rope_layers` stands for a layer with RoPE, a 0 for one without."""
    stated, period = config.get("no_rope_layers"), config.get("no_rope_layer_interval", NO_ROPE_PERIOD)
    if stated is None:
        return tuple(layer for layer in range(num_layers) if (layer + 1) % period == 0)
    if len(stated) < num_layers:
        raise ModelLoadError(f"config.json: no_rope_layers has {len(stated)} entries for {num_layers} layers")
    return tuple(layer for layer in range(num_layers) if not stated[layer])


def _gguf_keys(keys: GGUFKeys) -> dict[str, Any]:
    """Files do not say which layers have no RoPE: llama.cpp knows."""
    layers = range(keys["block_count"])
    return {"no_rope_layers": tuple(layer for layer in layers if (layer + 1) % NO_ROPE_PERIOD == 0)}


FAMILY = Family(
    name="smollm3",
    hf_architectures=("SmolLM3ForCausalLM",),
    gguf_architectures=("smollm3",),
    hf_defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    traits=_traits,
    gguf_keys=_gguf_keys,
    gguf_layout=TensorLayout(interleaved_rope=True),
)
