"""`load_model`: from whatever names a model to its configuration, parameters and tokenizer."""

from __future__ import annotations

from pathlib import Path

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.checkpoint import (
    MANIFEST,
    check_target,
    describe_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from fineserve_jax.loaders.fetch import ALIASES, fetch
from fineserve_jax.loaders.gguf_model import GGUFModel
from fineserve_jax.loaders.gguf_split import open_gguf
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.loaders.hf_tokenizer import check_texts_are_ended, hf_tokenizer
from fineserve_jax.loaders.loaded_model import LoadedModel
from fineserve_jax.models.params import DEFAULT_DEVICE, Placement, pack_params
from fineserve_jax.models.weight_formats import weight_recipe

DEFAULT_WEIGHTS = "bf16"


def load_model(source: str | Path, weights: str | None = "bf16", placement: Placement = DEFAULT_DEVICE) -> LoadedModel:
    """Load a model from an alias, a `.gguf` file, a Hugging Face directory, or a converted (Orbax) directory.

    weights: fp32, bf16, int8 or int4. A converted directory loads only in the precision it was made in; None takes
        that one, and bf16 for every other source.
    placement: where the weights go; what it refuses raises ConfigError before any is read.

    An alias is fetched into the cache when it is not there yet. Configuration, tokenizer, and the presence, shapes and
    extents of tensors are checked before tensors are read. Raises ModelLoadError.
    """
    return _load(source, weights, placement)


def describe_model(source: str | Path, weights: str | None = "bf16") -> LoadedModel:
    """The model as `load_model` gives it, but with `params` empty: its weights are not read, which would take time."""
    return _load(source, weights, None)


def _load(source: str | Path, weights: str | None, placement: Placement | None) -> LoadedModel:
    weight_recipe(weights or DEFAULT_WEIGHTS)
    path = resolve_source(source)
    name = _name(source, path)
    if path.is_file():
        return _load_gguf(path, weights or DEFAULT_WEIGHTS, name, placement)
    if (path / MANIFEST).exists():
        if placement is None:
            return describe_checkpoint(path, weights, name)
        return load_checkpoint(path, weights, name, placement)
    if (path / "config.json").exists():
        return _load_hf(path, weights or DEFAULT_WEIGHTS, name, placement)
    raise ModelLoadError(
        f"{path} is a directory without config.json or {MANIFEST}; "
        "give a Hugging Face directory (config.json and *.safetensors), one made by `fineserve-jax convert`, "
        "or the path of a .gguf file"
    )


def convert(source: str | Path, directory: str | Path, weights: str = "int8") -> LoadedModel:
    """Write `source`, its matrices stored as `weights`, to `directory` as a checkpoint that starts quickly.

    `load_model(directory, weights)` then needs nothing else. Returns the model written. Raises
    ModelLoadError, also when `directory` exists and is not empty.
    """
    check_target(Path(directory))
    model = load_model(source, weights)
    save_checkpoint(model, Path(directory))
    return model


def resolve_source(source: str | Path) -> Path:
    """The file or directory `source` names; raises ModelLoadError when there is none."""
    path = Path(source).expanduser()
    if path.exists():
        return path
    if str(source) in ALIASES:
        return fetch(str(source))
    raise _unknown(source)


def _name(source: str | Path, path: Path) -> str:
    return str(source) if str(source) in ALIASES else path.stem if path.is_file() else path.resolve().name


def _load_gguf(path: Path, weights: str, name: str, placement: Placement | None) -> LoadedModel:
    file = open_gguf(path)
    model = GGUFModel(file)
    tokenizer = gguf_tokenizer(file)
    params = {} if placement is None else pack_params(model.config, weights, model, placement)
    return LoadedModel(name, model.config, params, tokenizer, weights)


def _load_hf(path: Path, weights: str, name: str, placement: Placement | None) -> LoadedModel:
    model = HFModel(path)
    tokenizer = hf_tokenizer(path)
    if model.pooling is not None:
        check_texts_are_ended(path, tokenizer)
    params = {} if placement is None else pack_params(model.config, weights, model, placement)
    return LoadedModel(name, model.config, params, tokenizer, weights, model.pooling)


def _unknown(source: str | Path) -> ModelLoadError:
    return ModelLoadError(
        f"model {str(source)!r} is neither a path that exists nor a known alias "
        f"({', '.join(ALIASES)}); give an alias, "
        "a .gguf file, a Hugging Face directory (config.json and *.safetensors), or a directory made by "
        "`fineserve-jax convert`"
    )
