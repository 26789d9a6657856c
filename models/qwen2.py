"""Qwen2 and Qwen2.5: Llama with biases on q, k and v."""

from __future__ import annotations

from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.family import Family, HFConfig


def sliding_window(config: HFConfig) -> int | None:
    """The window all layers use, None for none; raises ModelLoadError where only some layers have one."""
    layers, types = int(config["num_hidden_layers"]), config.get("layer_types")
    size, used = config.get("sliding_window", 4096), config.get("use_sliding_window", False)
    window = size if used else None
    full = int(config.get("max_window_layers", 28))
    if types is None:
        types = ["sliding_attention" if index >= full and window else "full_attention" for index in range(layers)]
    unknown = sorted({kind for kind in types if kind not in ("sliding_attention", "full_attention")})
    if unknown or len(types) != layers:
        raise ModelLoadError(
            f"config.json: layer_types has {len(types)} entries for {layers} layers"
            + (f", among them {unknown[0]!a}" if unknown else "")
            + "; each layer needs one, sliding_attention or full_attention"
        )
    windowed = [index for index, kind in enumerate(types) if kind == "sliding_attention"]
    if not windowed or window is None:
        return None
    if len(windowed) < layers:
        consecutive = windowed == list(range(windowed[0], windowed[-1] + 1))
        which = f"{windowed[0]} to {windowed[-1]}" if consecutive else ", ".join(map(str, windowed))
        raise ModelLoadError(
            f"config.json gives a sliding window to layers {which} only, which is "
            f"not supported; "
            "set use_sliding_window to false to attend to the whole context"
        )
    return int(window)


def _traits(config: HFConfig) -> dict[str, Any]:
    return {"qkv_bias": True, "sliding_window": sliding_window(config)}


FAMILY = Family(
    name="qwen2",
    hf_architectures=("Qwen2ForCausalLM",),
    gguf_architectures=("qwen2",),
    hf_defaults={"num_key_value_heads": 32, "max_position_embeddings": 32768},
    traits=_traits,
    gguf_traits={"qkv_bias": True},
)
