"""Layers with and without a sliding window, as checkpoints tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fineserve_jax.errors import ModelLoadError

SLIDING, FULL = "sliding_attention", "full_attention"


def window_traits(layer_types: Sequence[str], num_layers: int, window: int | None) -> dict[str, Any]:
    """The fields of `ModelConfig` that say which layers have the window.

    Raises ModelLoadError for types that are not those of `num_layers` layers, or that are of a kind not known here.
    """
    unknown = sorted({kind for kind in layer_types if kind not in (SLIDING, FULL)})
    if unknown or len(layer_types) != num_layers:
        raise ModelLoadError(
            f"config.json: layer_types has {len(layer_types)} entries for {num_layers} layers"
            + (f", among them {unknown[0]!a}" if unknown else "")
            + f"; each layer needs one, {SLIDING} or {FULL}"
        )
    full = tuple(layer for layer, kind in enumerate(layer_types) if kind == FULL)
    if window is None or len(full) == num_layers:
        return {"sliding_window": None}
    return {"sliding_window": window, "full_attention_layers": full}


def window_of_all(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same, of a config.json that gives all layers the window, unless `layer_types` says otherwise."""
    layers, types = config["num_hidden_layers"], config.get("layer_types")
    return window_traits(types or [SLIDING] * layers, layers, config.get("sliding_window"))


def pattern_types(num_layers: int, pattern: int | Sequence[bool]) -> list[str]:
    """What GGUF's `sliding_window_pattern` says: a period, or of each layer whether it has the window."""
    if isinstance(pattern, int):
        return periodic_types(num_layers, pattern)
    if len(pattern) != num_layers:
        raise ModelLoadError(
            f"the file's attention.sliding_window_pattern has {len(pattern)} entries for {num_layers} layers; "
            "the file is damaged"
        )
    return [SLIDING if has_window else FULL for has_window in pattern]


def periodic_types(num_layers: int, period: int) -> list[str]:
    """Every `period`-th layer attends to all, the others have the window; with 0, all have it."""
    return [FULL if period and layer % period == period - 1 else SLIDING for layer in range(num_layers)]
