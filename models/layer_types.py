"""Layers with and without a sliding window, as checkpoints tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
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


def periodic_types(num_layers: int, period: int) -> list[str]:
    """Every `period`-th layer attends to all, the others have the window; with 0, all have it."""
    return [FULL if period and layer % period == period - 1 else SLIDING for layer in range(num_layers)]
