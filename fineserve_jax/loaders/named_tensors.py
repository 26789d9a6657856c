"""Tensors that a program has in memory, by the names that Hugging Face's checkpoints give them, as a checkpoint."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from fineserve_jax.loaders.hf_tensors import HEAD, HFTensors
from fineserve_jax.models.model_config import ModelConfig


class NamedTensors:
    """A `TensorSource` of arrays.

    config: the model's.
    tensors: by name, such as `model.layers.0.self_attn.q_proj.weight`; arrays of numpy or JAX, of any float type. Where
        the embedding is the head, too, that may be among them once more as the head.
    """

    def __init__(self, config: ModelConfig, tensors: Mapping[str, Any]) -> None:
        self.config, self._given = config, tensors
        self._tensors = HFTensors(config, _Arrays(tensors))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when there is none."""
        return self._tensors.shape(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, f32, or these rows of it; of q and k whole heads."""
        return self._tensors.read(name, rows)

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used`."""
        tied = self.config.tie_embeddings and self._tensors.head_is_the_embedding()
        known = self._tensors.stored_names([*used, HEAD] if tied else used)
        return sorted(name for name in self._given if name not in known)


class _Arrays:
    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        return tuple(self._tensors[name].shape) if name in self._tensors else None

    def read(self, name: str, index: int | None, rows: slice | None) -> np.ndarray:
        tensor = self._tensors[name] if index is None else self._tensors[name][index]
        return np.array(tensor if rows is None else tensor[rows], np.float32)
