"""The tensors of a GGUF file as a model's: by Hugging Face name, in Hugging Face's layout."""

from __future__ import annotations

import re
from collections.abc import Collection

import numpy as np

from fineserve_jax.loaders.gguf_config import ROPE_FACTORS, gguf_config
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_names import gguf_tensor_name
from fineserve_jax.models.params import tensor_shape
from fineserve_jax.models.registry import get_family

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
        self._unpermute = family.gguf_permuted_qk
        self._all_biases_required = bool(family.gguf_traits.get("qkv_bias"))

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor of that Hugging Face name; None when the file lacks it."""
        info = self.file.tensors.get(self._stored_name(name))
        if info is None and self._is_zero(name):
            return tensor_shape(self.config, name)
        return info.shape if info else None

    def read(self, name: str) -> np.ndarray:
        """The tensor of that Hugging Face name, f32."""
        if self._is_zero(name):
            return np.zeros(tensor_shape(self.config, name), np.float32)
        tensor = self.file.read(self._stored_name(name))
        if self._unpermute and ".q_proj." in name:
            return unpermute_heads(tensor, self.config.num_heads)
        if self._unpermute and ".k_proj." in name:
            return unpermute_heads(tensor, self.config.num_kv_heads)
        return tensor

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used`, by their GGUF names, that would change the model's numbers."""
        known = {ROPE_FACTORS, *map(self._stored_name, used)}
        return sorted(name for name in self.file.tensors if name not in known and not _HARMLESS.fullmatch(name))

    def _stored_name(self, name: str) -> str:
        return gguf_tensor_name(name, self.config.post_norms)

    def _is_zero(self, name: str) -> bool:
        """Each bias may be there or not, as in llama.cpp, unless the family always has them."""
        absent = name.endswith(".bias") and self._stored_name(name) not in self.file.tensors
        return absent and not self._all_biases_required


def unpermute_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved order (0, d/2, 1, d/2 + 1, ...) to half-rotation order."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
