"""A language model out of a Hugging Face directory: config.json and *.safetensors, one file or sharded."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections import Counter
from collections.abc import Collection, Mapping
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
from fineserve_jax.loaders.laid_out_tensors import LaidOutTensors
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
        names = {name: name for name in self._where}
        if has_text_part(raw):
            names = self._without_images()
        self._stored = _Stored(directory, {name: (self._where[stored], stored) for name, stored in names.items()})
        if self.config.tie_embeddings and _HEAD in names and not self._head_is_the_embedding():
            # The flag is often left at its default; a head that was stored and differs is meant.
            self.config = dataclasses.replace(self.config, tie_embeddings=False)
        layout = get_family(self.config.family).hf_layout
        self._tensors = LaidOutTensors(self.config, layout, self._stored, _stored_name)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when no file has it. Raises ModelLoadError when its type is no float."""
        return self._tensors.shape(name)

    def read(self, name: str) -> np.ndarray:
        """The tensor, f32."""
        tensor = self._tensors.read(name)
        return tensor + self._norm_offset if name.endswith("norm.weight") else tensor

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used` that would change the model's numbers, by the names that the files have for them."""
        known = self._tensors.stored_names(used) | ({_HEAD} if self.config.tie_embeddings else set())
        return sorted(name for name in self._stored.where if name not in known and not _HARMLESS.fullmatch(name))

    def _without_images(self) -> dict[str, str]:
        """The tensors by the names that they have in a model of the text part alone, and as the files call them."""
        names = {stored: text_tensor_name(stored) for stored in self._where}
        stored_names = {name: stored for stored, name in names.items() if name is not None}
        if left_out := len(names) - len(stored_names):
            log.warning("%s: %d tensors are for images, and left out: prompts are text", self.directory, left_out)
        return stored_names

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
        if _EMBEDDING not in self._stored.where or self._stored.shape(_EMBEDDING) != self._stored.shape(_HEAD):
            return False
        rows = (self._stored.shape(_HEAD) or (0,))[0]
        embedding, head = (self._stored.opened(name) for name in (_EMBEDDING, _HEAD))
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


@dataclasses.dataclass(frozen=True)
class _Stored:
    """See `StoredTensors`. where: of each tensor the open file that has it, and what it is called there."""

    directory: Path
    where: Mapping[str, tuple[Any, str]]

    def opened(self, name: str) -> Any:
        file, stored = self.where[name]
        return file.get_slice(stored)

    def shape(self, name: str) -> tuple[int, ...] | None:
        if name not in self.where:
            return None
        part = self.opened(name)
        if part.get_dtype() not in _FLOAT_TYPES:
            raise ModelLoadError(
                f"{self.directory}: tensor {name} is of type {part.get_dtype()}, which is not supported; "
                f"supported: {', '.join(_FLOAT_TYPES)}"
            )
        return tuple(part.get_shape())

    def read(self, name: str, index: int | None, rows: slice | None) -> np.ndarray:
        tensor, taken = self.opened(name), slice(None) if rows is None else rows
        return np.asarray(tensor[taken] if index is None else tensor[index][taken]).astype(np.float32)


def _stored_name(prefix: str, part: str, kind: str, stacked: bool) -> str:
    """Stacks of experts are parameters of one module: their names end in the part's, those of biases in `_bias`."""
    if stacked:
        return f"{prefix}{part}{'_bias' if kind == 'bias' else ''}"
    return f"{prefix}{part}.{kind}" if kind else f"{prefix}{part}"


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is missing, although the checkpoint's index names it; download it") from error
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is not a readable safetensors file: {error}; download it again") from error
