"""Quantised Hugging Face checkpoints: which method one uses, and its tensors as if they were not quantised."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import compressed_tensors, quantized_awq, quantized_gptq, quantized_scaled
from fineserve_jax.loaders.known_keys import CheckedKeys, KeyReader, check_keys, shown
from fineserve_jax.loaders.matrix_parts import MatrixParts, Method, RowSource
from fineserve_jax.loaders.safetensors_files import SafetensorsFiles
from fineserve_jax.models.row_packing import LatestOfThread

_QUOTE = "'"
_WHERE = "config.json: quantization_config."
_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
# For each method: the schema of its settings, what makes it of them, and which other settings change nothing.
_METHODS: dict[str, tuple[type[CheckedKeys], Callable[[Any], Method], Collection[str]]] = {
    "awq": (quantized_awq.AWQKeys, quantized_awq.awq, quantized_awq.HARMLESS),
    "gptq": (quantized_gptq.GPTQKeys, quantized_gptq.gptq, quantized_gptq.HARMLESS),
    "fp8": (quantized_scaled.FP8Keys, quantized_scaled.fp8, quantized_scaled.HARMLESS),
    "compressed-tensors": (
        compressed_tensors.CompressedKeys,
        compressed_tensors.compressed_tensors,
        compressed_tensors.HARMLESS,
    ),
}
_STACKS = "mxfp4"  # of experts only, told from their names: see `quantized_mxfp4`
# Which layers are not quantised is seen from their tensors.
_HARMLESS = frozenset(("quant_method", "modules_to_not_convert"))
# Scales of a KV cache that is kept in fp8: the precision of the cache is chosen here.
_KV_SCALES = ("k_scale", "v_scale", "k_proj.k_scale", "v_proj.v_scale", "kv_scale", "q_scale", "prob_scale")


def quantization_method(settings: Mapping[str, Any] | None) -> Method | None:
    """The method of a config.json's `quantization_config`; None where there is none, or for experts alone.

    Raises ModelLoadError, naming it, for a method or a form of one that is not supported, and for settings that are not
    known.
    """
    if not settings:
        return None
    name = settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else "unknown")
    if not isinstance(name, str) or name not in (*_METHODS, _STACKS):
        raise ModelLoadError(
            f"the checkpoint is quantised ({shown(name).strip(_QUOTE)}), in a way which is not supported; supported: "
            f"{', '.join((*_METHODS, _STACKS))}; use one of these, or the unquantised checkpoint and choose a "
            "precision with weights=..."
        )
    if name == _STACKS:
        KeyReader(settings, _WHERE).refuse_unread(_HARMLESS, {})
        return None
    schema, make, harmless = _METHODS[name]
    keys = check_keys(schema, settings, _WHERE)
    method = make(keys)
    reader = KeyReader(settings, _WHERE)
    for known in schema.model_fields:
        reader.get(known)
    reader.refuse_unread({*harmless, *_HARMLESS}, {})
    return method


class PlainTensors:
    """The tensors of a checkpoint as f32, dequantised a few rows at a time.

    files: where they are.
    method: how matrices are quantised that are; None if none is.
    """

    def __init__(self, files: SafetensorsFiles, method: Method | None) -> None:
        self.files, self.method = files, method
        self._latest = LatestOfThread()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when no file has it.

        Raises ModelLoadError when its type is no float, or the tensors that it is packed into do not fit together.
        """
        if (parts := self._quantized(name)) is not None and self.method is not None:
            return self.method.shape(parts)
        stored = self.files.tensors.get(name)
        if stored is None:
            return None
        if stored.dtype not in _FLOAT_TYPES:
            raise ModelLoadError(
                f"{self.files.directory}: tensor {name} is of type {stored.dtype}, which is not supported; "
                f"supported: {', '.join(_FLOAT_TYPES)}"
            )
        return stored.shape

    def read(self, name: str, index: int | None = None, rows: slice | None = None) -> np.ndarray:
        """The tensor, f32, or of a stack the matrix `index`; of that the `rows`."""
        parts = self._quantized(name)
        if parts is None:
            return self.files.read(name, index, rows).astype(np.float32)
        method = self.method
        assert method is not None, "only a method makes parts of a matrix"
        source: RowSource = self._latest.get(name, lambda: method.open(parts))
        start, stop, step = (rows or slice(None)).indices(method.shape(parts)[0])
        return source.rows(slice(start, stop))[::step]

    def stored_names(self, names: Collection[str]) -> set[str]:
        """What the files hold of these tensors, all that they are packed into included."""
        return {found for name in names for found in self._names(name) if found in self.files.tensors}

    def _names(self, name: str) -> set[str]:
        module, _, end = name.rpartition(".")
        if self.method is None or end != "weight":
            return {name}
        ends = self.method.ends if self._quantized(name) is not None else ()
        owner = module.rpartition(".")[0]
        return {name, *(f"{module}.{part}" for part in ends), *(f"{owner}.{scale}" for scale in _KV_SCALES)}

    def _quantized(self, name: str) -> MatrixParts | None:
        module, _, end = name.rpartition(".")
        if self.method is None or end != "weight":
            return None
        parts = MatrixParts(self.files, module)
        return parts if self.method.applies(parts) else None
