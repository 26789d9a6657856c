"""A language model out of a Hugging Face directory: config.json and *.safetensors, one file or sharded."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Collection
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, which safetensors looks up by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.hf_multimodal import has_text_part, text_tensor_name
from fineserve_jax.loaders.hf_schema import HFIndex
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.known_keys import check_keys
from fineserve_jax.models.registry import get_family

log = logging.getLogger(__name__)
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_A_TIME = 1024
# Tables of rotations, which older versions of transformers stored: they follow from the configuration.
_HARMLESS = re.compile(r"(model\.(layers\.\d+\.self_attn\.)?)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


class HFModel:
    """Configuration and tensors of a Hugging Face directory.

    Raises ModelLoadError for an unsupported architecture or configuration, and for files that are absent or
    damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = read_json(directory / "config.json")
        self.config = hf_config(raw)
        self._norm_offset = np.float32(get_family(self.config.family).hf_norm_offset)
        self._files = {path: _open(path) for path in self._tensor_files()}
        self._where = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118
        self._refuse_duplicates()
        self._stored_names = {name: name for name in self._where}
        if has_text_part(raw):
            self._leave_out_images()
        if self.config.tie_embeddings and _HEAD in self._where and not self._head_is_the_embedding():
            # The flag is often left at its default; a head that was stored and differs is meant.
            self.config = dataclasses.replace(self.config, tie_embeddings=False)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when no file has it. Raises ModelLoadError when its type is no float."""
        if name not in self._where:
            return None
        part = self._slice(name)
        if part.get_dtype() not in _FLOAT_TYPES:
            raise ModelLoadError(
                f"{self.directory}: tensor {name} is of type {part.get_dtype()}, which is not supported; "
                f"supported: {', '.join(_FLOAT_TYPES)}"
            )
        return tuple(part.get_shape())

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as f32."""
        tensor: np.ndarray = self._where[name].get_tensor(self._stored_names[name]).astype(np.float32)
        return tensor + self._norm_offset if name.endswith("norm.weight") else tensor

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used` that would change the model's numbers."""
        known = {*used, _HEAD} if self.config.tie_embeddings else set(used)
        return sorted(name for name in self._where if name not in known and not _HARMLESS.fullmatch(name))

    def _slice(self, name: str) -> Any:
        return self._where[name].get_slice(self._stored_names[name])

    def _leave_out_images(self) -> None:
        """Tensors get the names that they have in a model of the text part alone."""
        names = {stored: text_tensor_name(stored) for stored in self._stored_names}
        self._stored_names = {name: stored for stored, name in names.items() if name is not None}
        self._where = {name: self._where[stored] for name, stored in self._stored_names.items()}
        if left_out := len(names) - len(self._stored_names):
            log.warning("%s: %d tensors are for images, and left out: prompts are text", self.directory, left_out)

    def _refuse_duplicates(self) -> None:
        counts = Counter(name for file in self._files.values() for name in file.keys())  # noqa: SIM118
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ModelLoadError(
                f"{self.directory}: tensor {twice[0]!a} is in more than one of {len(self._files)} files "
                f"({', '.join(path.name for path in self._files)}); keep one set of weights"
            )

    def _head_is_the_embedding(self) -> bool:
        """Compares a few rows at a time, so that two large tables are never in memory."""
        if _EMBEDDING not in self._where or self.shape(_EMBEDDING) != self.shape(_HEAD):
            return False
        rows = (self.shape(_HEAD) or (0,))[0]
        embedding, head = (self._slice(name) for name in (_EMBEDDING, _HEAD))
        pieces = (slice(at, min(at + _ROWS_AT_A_TIME, rows)) for at in range(0, rows, _ROWS_AT_A_TIME))
        return all(np.array_equal(embedding[piece], head[piece]) for piece in pieces)

    def _tensor_files(self) -> list[Path]:
        index = self.directory / _INDEX
        if index.exists():
            names = sorted(set(check_keys(HFIndex, read_json(index), f"{_INDEX}: ").weight_map.values()))
            files = [self.directory / name for name in names]
        else:
            files = sorted(self.directory.glob("model*.safetensors"))
        if not files:
            raise ModelLoadError(
                f"{self.directory} has no model*.safetensors; PyTorch *.bin files must be converted "
                f"to safetensors first"
            )
        return files


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is missing, although the checkpoint's index names it; download it") from error
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is not a readable safetensors file: {error}; download it again") from error
