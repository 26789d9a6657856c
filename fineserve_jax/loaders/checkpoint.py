"""Converted checkpoints: parameters already fused and quantised, in a directory that needs nothing else.

DIRECTORY/fineserve.json         format version, weights, model configuration, how vectors of texts are made
DIRECTORY/params/                Orbax: the parameter tree
DIRECTORY/tokenizer.json, tokenizer_config.json, generation_config.json
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.checkpoint_params import read_params, save_params
from fineserve_jax.loaders.hf_tokenizer import hf_tokenizer, save_tokenizer
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.known_keys import CheckedKeys, check_keys
from fineserve_jax.loaders.loaded_model import LoadedModel
from fineserve_jax.loaders.pooling_settings import Pooling, PoolingSettings
from fineserve_jax.loaders.tokenizer_check import check_same_ids
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.params import DEFAULT_DEVICE, Placement, abstract_params

MANIFEST = "fineserve.json"
_FORMAT_VERSION = 1


class _Pooling(CheckedKeys):
    """Fields of `PoolingSettings`."""

    pooling: Pooling
    normalize: bool
    has_head: bool


class _Manifest(CheckedKeys):
    """What fineserve.json holds beside its version."""

    weights: str
    config: dict[str, Any]
    pooling: _Pooling | None = None


def check_target(directory: Path) -> None:
    """Raises ModelLoadError unless `directory` is absent or empty: nothing is ever overwritten."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ModelLoadError(f"{directory} exists and is not an empty directory; choose another or remove it")


def save_checkpoint(model: LoadedModel, directory: Path) -> None:
    """Write `model` to `directory`, which appears complete or not at all.

    Raises ModelLoadError, also where the tokenizer that was written gives other ids than the model's.
    """
    check_target(directory)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{directory.name}-", dir=directory.parent))
        try:
            _write(model, scratch)
            scratch.chmod(0o755)  # mkdtemp keeps others out
            scratch.replace(directory)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        raise ModelLoadError(f"cannot write {directory}: {error.strerror or error}") from error


def load_checkpoint(
    directory: Path, weights: str | None, name: str, placement: Placement = DEFAULT_DEVICE
) -> LoadedModel:
    """The model of a converted directory, under that name.

    weights: what the caller asked for; another precision than the stored one raises ModelLoadError, None takes what
        is stored.
    placement: where the parameters go.
    """
    model = describe_checkpoint(directory, weights, name)
    placement.check(model.config, model.weights)
    place = functools.partial(placement.place, model.config, model.weights)
    params = read_params(directory / "params", abstract_params(model.config, model.weights), place)
    return dataclasses.replace(model, params=params)


def describe_checkpoint(directory: Path, weights: str | None, name: str) -> LoadedModel:
    """What `load_checkpoint` returns, but with `params` empty: they are not read."""
    manifest = read_json(directory / MANIFEST)
    if manifest.get("format_version") != _FORMAT_VERSION:
        raise ModelLoadError(
            f"{directory} is in checkpoint format {manifest.get('format_version')!r}, this version reads "
            f"{_FORMAT_VERSION}; convert the model again"
        )
    stated = check_keys(_Manifest, manifest, f"{directory / MANIFEST}: ")
    stored = stated.weights
    if weights not in (None, stored):
        raise ModelLoadError(
            f"{directory} holds {stored} weights, {weights} was asked for; use weights={stored!r}, "
            f"or convert the original model again with {weights}"
        )
    own = stated.pooling
    pooling = None if own is None else PoolingSettings(own.pooling, own.normalize, own.has_head)
    return LoadedModel(name, ModelConfig.from_dict(stated.config), {}, hf_tokenizer(directory), stored, pooling)


def _write(model: LoadedModel, directory: Path) -> None:
    save_tokenizer(model.tokenizer, directory)
    check_same_ids(model.tokenizer, hf_tokenizer(directory))
    save_params(directory / "params", model.params)
    manifest = {
        "format_version": _FORMAT_VERSION,
        "weights": model.weights,
        "config": model.config.to_dict(),
    }
    if model.pooling is not None:
        manifest["pooling"] = dataclasses.asdict(model.pooling)
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
