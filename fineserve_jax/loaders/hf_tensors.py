"""The tensors of a model by the names of Hugging Face's checkpoints, wherever they are: in files, or in memory."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fineserve_jax.loaders.laid_out_tensors import LaidOutTensors, StoredTensors
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.registry import get_family

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_A_TIME = 1024


class HFTensors:
    """What a `TensorSource` reads.

    config: the model's.
    stored: the tensors as the checkpoint has them.
    """

    def __init__(self, config: ModelConfig, stored: StoredTensors) -> None:
        family = get_family(config.family)
        self._norm_offset = np.float32(family.hf_norm_offset)
        self._laid_out = LaidOutTensors(config, family.hf_layout, stored, _stored_name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when there is none. Raises ModelLoadError when its type is no float."""
        return self._laid_out.shape(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, f32, or these rows of it; of q and k whole heads."""
        tensor = self._laid_out.read(name, rows)
        return tensor + self._norm_offset if name.endswith("norm.weight") else tensor

    def stored_names(self, names: Collection[str]) -> set[str]:
        """What the checkpoint calls these tensors."""
        return self._laid_out.stored_names(names)

    def head_is_the_embedding(self) -> bool:
        """Compares a few rows at a time, so that two large tables are never in memory."""
        if self.shape(EMBEDDING) != self.shape(HEAD):
            return False
        rows = (self.shape(HEAD) or (0,))[0]
        pieces = (slice(at, min(at + _ROWS_AT_A_TIME, rows)) for at in range(0, rows, _ROWS_AT_A_TIME))
        return all(np.array_equal(self.read(EMBEDDING, piece), self.read(HEAD, piece)) for piece in pieces)


def _stored_name(prefix: str, part: str, kind: str, stacked: bool) -> str:
    """What Hugging Face's checkpoints call a tensor, see `NameOf`.

    Stacks of experts are parameters of one module: their names end in the part's, those of biases in `_bias`.
    """
    if stacked:
        return f"{prefix}{part}{'_bias' if kind == 'bias' else ''}"
    return f"{prefix}{part}.{kind}" if kind else f"{prefix}{part}"
