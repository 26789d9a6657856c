"""A language model out of a Hugging Face directory: config.json and *.safetensors, one file or sharded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (teaches numpy bfloat16, which safetensors looks up by name)
import numpy as np
from safetensors import SafetensorError, safe_open

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.models.family import Family
from fineserve_jax.models.model_config import ModelConfig, RopeScaling
from fineserve_jax.models.registry import family_of_hf_architecture

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_INDEX = "model.safetensors.index.json"


class HFModel:
    """Configuration and tensors of a Hugging Face directory.

    Raises ModelLoadError for an unsupported architecture or configuration, and for files that are absent or
    damaged.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.config = hf_config(read_json(directory / "config.json"))
        self._files = {path: _open(path) for path in self._tensor_files()}
        self._where = {name: file for file in self._files.values() for name in file.keys()}  # noqa: SIM118

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when no file has it. Raises ModelLoadError when its type is no float."""
        if name not in self._where:
            return None
        part = self._where[name].get_slice(name)
        if part.get_dtype() not in _FLOAT_TYPES:
            raise ModelLoadError(
                f"{self.directory}: tensor {name} is of type {part.get_dtype()}, which is not supported; "
                f"supported: {', '.join(_FLOAT_TYPES)}"
            )
        return tuple(part.get_shape())

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` as f32."""
        return self._where[name].get_tensor(name).astype(np.float32)

    def _tensor_files(self) -> list[Path]:
        index = self.directory / _INDEX
        if index.exists():
            names = sorted(set(read_json(index).get("weight_map", {}).values()))
            files = [self.directory / name for name in names]
        else:
            files = sorted(self.directory.glob("model*.safetensors"))
        if not files:
            raise ModelLoadError(
                f"{self.directory} has no model*.safetensors; PyTorch *.bin files must be converted "
                f"to safetensors first"
            )
        return files


def hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration a parsed config.json describes; raises ModelLoadError."""
    architectures = raw.get("architectures") or ["(none stated)"]
    family = family_of_hf_architecture(architectures[0])
    _refuse_unsupported(raw)
    full = {**family.hf_defaults, **{key: value for key, value in raw.items() if value is not None}}
    # A null is a statement about the window ("none"), elsewhere it means the default.
    full |= {key: None for key in ("sliding_window",) if key in raw and raw[key] is None}
    try:
        return _model_config(family, full)
    except KeyError as error:
        raise ModelLoadError(f"config.json has no {error.args[0]!r}, which {architectures[0]} needs") from error


def _model_config(family: Family, full: dict[str, Any]) -> ModelConfig:
    heads, hidden = int(full["num_attention_heads"]), int(full["hidden_size"])
    rope = _rope_parameters(full)
    return ModelConfig(
        family=family.name,
        vocab_size=int(full["vocab_size"]),
        hidden_size=hidden,
        num_layers=int(full["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(full.get("num_key_value_heads", heads)),
        head_dim=int(full.get("head_dim", hidden // heads)),
        intermediate_size=int(full["intermediate_size"]),
        rope_theta=float(rope.get("rope_theta", 10000.0)),
        rope_scaling=_rope_scaling(rope, int(full["max_position_embeddings"])),
        norm_eps=float(full.get("rms_norm_eps", 1e-6)),
        tie_embeddings=bool(full.get("tie_word_embeddings", False)),
        max_position=int(full["max_position_embeddings"]),
        **family.traits(full),
    )


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Features that, ignored, would give wrong text instead of an error."""
    activation = raw.get("hidden_act") or "silu"
    if activation not in ("silu", "swish"):
        raise ModelLoadError(f"config.json: hidden_act {activation!r} is not supported; supported: silu")
    if raw.get("mlp_bias"):
        raise ModelLoadError("config.json: mlp_bias is true, which is not supported")
    if quantized := raw.get("quantization_config"):
        method = quantized.get("quant_method", "unknown")
        raise ModelLoadError(
            f"the checkpoint is quantised ({method}), which is not supported; "
            "use the unquantised checkpoint and choose a precision with weights=..."
        )


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One dict from the newer form (`rope_parameters`) or the older (`rope_theta` and `rope_scaling`)."""
    stated = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    theta = {"rope_theta": raw["rope_theta"]} if "rope_theta" in raw else {}
    rope = {**theta, **{key: value for key, value in stated.items() if value is not None}}
    partial = float(rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0)))
    if partial != 1.0:
        raise ModelLoadError(f"config.json: partial_rotary_factor {partial} is not supported, only 1")
    return rope


def _rope_scaling(rope: Mapping[str, Any], max_position: int) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "factors":  # a kind of GGUF files only
        raise ModelLoadError("config.json: RoPE scaling 'factors' is not supported; use llama3")
    original = int(rope.get("original_max_position_embeddings", max_position))
    factor = float(rope.get("factor", max_position / original))
    return RopeScaling(
        kind=kind,
        factor=factor,
        original_max_position=original,
        low_freq_factor=float(rope.get("low_freq_factor", 1.0)),
        high_freq_factor=float(rope.get("high_freq_factor", 4.0)),
        beta_fast=float(rope.get("beta_fast", 32.0)),
        beta_slow=float(rope.get("beta_slow", 1.0)),
        attention_factor=_attention_factor(rope),
        truncate=bool(rope.get("truncate", True)),
    )


def _attention_factor(rope: Mapping[str, Any]) -> float | None:
    if rope.get("mscale") and rope.get("mscale_all_dim") and rope["mscale"] != rope["mscale_all_dim"]:
        raise ModelLoadError("config.json: yarn with mscale different from mscale_all_dim is not supported")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return float(rope.get("attention_factor", 1.0))  # equal temperatures cancel
    return float(rope["attention_factor"]) if "attention_factor" in rope else None


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="numpy")
    except FileNotFoundError as error:
        raise ModelLoadError(f"{path} is missing, although the checkpoint's index names it; download it") from error
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{path} is not a readable safetensors file: {error}; download it again") from error
