"""A language model out of a Hugging Face directory: config.json and *.safetensors, one file or sharded."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection
from pathlib import Path

import numpy as np

from fineserve_jax.loaders.embedding_models import refuse_bare_tensors, with_head, with_prefix
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.hf_multimodal import has_text_part, text_part, text_tensor_name
from fineserve_jax.loaders.hf_tensors import HEAD, HFTensors
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.pooling_settings import PoolingSettings
from fineserve_jax.loaders.quantization import PlainTensors, quantization_method
from fineserve_jax.loaders.quantized_mxfp4 import MXFP4Stacks
from fineserve_jax.loaders.safetensors_files import SafetensorsFiles
from fineserve_jax.loaders.sentence_transformers import pooling_settings, refuse_other_attention

log = logging.getLogger(__name__)
# Tables of rotations, which older versions of transformers stored: they follow from the configuration.
_HARMLESS = re.compile(r"(model\.(layers\.\d+\.self_attn\.)?)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")


class HFModel:
    """Configuration and tensors of a Hugging Face directory.

    pooling: see `LoadedModel`. A model that is made for vectors and has no output head has its embedding for one.

    Raises ModelLoadError for an unsupported architecture or configuration, and for files that are absent or
    damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        pooling, raw = pooling_settings(directory), read_json(directory / "config.json")
        states_head = True
        if pooling is not None:
            refuse_other_attention(raw)
            raw, states_head = with_head(raw)
        self.config = hf_config(raw)
        self._files = SafetensorsFiles(directory)
        if has_text_part(raw):
            self._leave_out_images()
        if pooling is None:
            refuse_bare_tensors(directory, self._files.tensors, self.config.tie_embeddings)
        self.pooling = pooling and self._made_for_vectors(pooling, states_head)
        text = text_part(raw)
        method = quantization_method(text.get("quantization_config") or text.get("compression_config"))
        self._stored = MXFP4Stacks(PlainTensors(self._files, method))
        self._tensors = HFTensors(self.config, self._stored)
        if (
            self.config.tie_embeddings
            and self._tensors.shape(HEAD) is not None
            and not self._tensors.head_is_the_embedding()
        ):
            # The flag is often left at its default; a head that was stored and differs is meant.
            self.config = dataclasses.replace(self.config, tie_embeddings=False)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when no file has it. Raises ModelLoadError when its type is no float."""
        return self._tensors.shape(name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, f32, or these rows of it; of q and k whole heads."""
        return self._tensors.read(name, rows)

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used` that would change the model's numbers, by the names that the files have for them."""
        names = self._tensors.stored_names([*used, HEAD] if self.config.tie_embeddings else used)
        known = self._stored.stored_names(names)
        return sorted(name for name in self._files.tensors if name not in known and not _HARMLESS.fullmatch(name))

    def _made_for_vectors(self, pooling: PoolingSettings, states_head: bool) -> PoolingSettings:
        """Tensors get the names that they have in a language model, and the embedding stands for a head that is not
        there."""
        stored = self._files.tensors
        self._files.tensors = {name: stored[own] for own, name in with_prefix(stored).items()}
        has_head = any(name.startswith("lm_head.") for name in stored) or (states_head and self.config.tie_embeddings)
        if not has_head:
            self.config = dataclasses.replace(self.config, tie_embeddings=True)
        return dataclasses.replace(pooling, has_head=has_head)

    def _leave_out_images(self) -> None:
        """Tensors get the names that they have in a model of the text part alone."""
        names = {stored: text_tensor_name(stored) for stored in self._files.tensors}
        kept = {name: self._files.tensors[stored] for stored, name in names.items() if name is not None}
        if left_out := len(names) - len(kept):
            log.warning("%s: %d tensors are for images, and left out: prompts are text", self.directory, left_out)
        self._files.tensors = kept
