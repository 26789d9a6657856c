"""The tensors of a GGUF file as a model's: by their usual names, in the usual layout."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection

import numpy as np

from fineserve_jax.loaders.gguf_config import LONG_ROPE_FACTORS, ROPE_FACTORS, SHORT_ROPE_FACTORS, gguf_config
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_names import NAMES, STACKS, gguf_name
from fineserve_jax.loaders.laid_out_tensors import LaidOutTensors
from fineserve_jax.models.params import tensor_shape
from fineserve_jax.models.registry import get_family
from fineserve_jax.models.tensor_layout import TensorLayout

# Tables of rotations, which older converters stored: they follow from the metadata.
_HARMLESS = re.compile(r"blk\.\d+\.attn_rot_embd\.weight")


class GGUFModel:
    """Configuration and tensors of a GGUF file.

    config: derived from the metadata and from which tensors are present.

    Raises ModelLoadError for an unsupported architecture, metadata that are missing, out of range or unknown, or a
    feature that would silently change results.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.config = gguf_config(file)
        family = get_family(self.config.family)
        self._all_biases_required = bool(family.gguf_traits.get("qkv_bias"))
        own = family.gguf_layout
        layout = TensorLayout(NAMES | dict(own.names), (*own.joined, *STACKS), own.interleaved_rope)
        self._tensors = LaidOutTensors(self.config, layout, _Stored(file), gguf_name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when the file lacks it."""
        shape = self._tensors.shape(name)
        return tensor_shape(self.config, name) if shape is None and self._may_be_zero(name) else shape

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, f32, or these rows of it; of q and k whole heads."""
        if self._may_be_zero(name) and self._tensors.shape(name) is None:
            return np.zeros(tensor_shape(self.config, name), np.float32)
        return self._tensors.read(name, rows)

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used`, by their GGUF names, that would change the model's numbers."""
        known = {ROPE_FACTORS, *self._tensors.stored_names(used)}
        if self.config.long_after is not None:
            known |= {SHORT_ROPE_FACTORS, LONG_ROPE_FACTORS}
        return sorted(name for name in self.file.tensors if name not in known and not _HARMLESS.fullmatch(name))

    def _may_be_zero(self, name: str) -> bool:
        """Each bias may be there or not, as in llama.cpp, unless the family always has them."""
        return name.endswith(".bias") and not self._all_biases_required


@dataclasses.dataclass(frozen=True)
class _Stored:
    """See `StoredTensors`."""

    file: GGUFFile

    def shape(self, name: str) -> tuple[int, ...] | None:
        info = self.file.tensors.get(name)
        return info.shape if info else None

    def read(self, name: str, index: int | None, rows: slice | None) -> np.ndarray:
        return self.file.read(name, index, rows)
