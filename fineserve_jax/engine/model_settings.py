"""The models of an engine that serves several: what each is called, where it comes from, what is special about it."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from fineserve_jax.engine.engine_config import EngineConfig, Weights
from fineserve_jax.errors import ConfigError
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.loaders.load import resolve_source
from fineserve_jax.validation import Validated


class ModelSettings(Validated):
    """How one model is served. What is None is as the engine's `EngineConfig` has it.

    Attributes:
        kv_precision: KV format of its requests that do not name one.
        max_seq_len: most tokens of its requests.
    """

    kv_precision: str | None = None
    max_seq_len: int | None = Field(default=None, ge=2)

    def over(self, config: EngineConfig) -> EngineConfig:
        """The engine's settings as this model has them. Raises `ConfigError` for those that contradict each other."""
        own = {"kv_precision": self.kv_precision, "max_seq_len": self.max_seq_len}
        return EngineConfig(**{**config.model_dump(), **{name: value for name, value in own.items() if value}})


class ModelSource(ModelSettings):
    """Where a model comes from, and how it is served.

    Attributes:
        model: an alias, a .gguf file, a Hugging Face directory or a converted directory.
        weights: precision of its weights.
    """

    model: str
    weights: Weights | None = None

    @field_validator("model", mode="before")
    @classmethod
    def _path_as_text(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value


def model_sources(models: Mapping[str, Any] | None) -> dict[str, ModelSource]:
    """What a user says of several models, checked: name -> alias or path, or a table of the fields of `ModelSource`.

    Raises:
        ConfigError: no model, a name that is no text, or fields that are unknown, missing or bad.
    """
    if not isinstance(models, Mapping) or not models:
        raise ConfigError(
            f"models={models!r} names no model; give names with a path or alias each, such as "
            '{"small": "smollm2-135m", "fast": {"model": "smollm2-135m", "weights": "int8"}}'
        )
    return {_checked_name(name): _model_source(name, value) for name, value in models.items()}


def load_models(
    sources: Mapping[str, ModelSource],
    config: EngineConfig,
    load: Callable[[str, str | None], LoadedModel] = load_model,
) -> dict[str, LoadedModel]:
    """Loads models by name. Those of one file in one precision share their weights.

    Args:
        load: of a source in a precision; `describe_model` where no weights are wanted.

    Raises:
        ConfigError: settings of a model that the engine's contradict.
        ModelLoadError: see `load_model`; a model that cannot be found is reported before any is loaded.
    """
    for name, source in sources.items():
        try:
            source.over(config)
        except ConfigError as error:
            raise ConfigError(f"model {name!r}: {error}") from None
    keys = {name: (resolve_source(source.model), source.weights or config.weights) for name, source in sources.items()}
    loaded: dict[tuple[Path, str | None], LoadedModel] = {}
    for name, key in keys.items():
        if key not in loaded:
            loaded[key] = load(sources[name].model, key[1])
    return {name: dataclasses.replace(loaded[key], name=name) for name, key in keys.items()}


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"a model is called {name!r}; requests name their model, so give it a name that is text")
    return name


def _model_source(name: str, value: Any) -> ModelSource:
    if isinstance(value, str | Path):
        return ModelSource.model_validate({"model": value})
    if isinstance(value, ModelSource):
        return value
    if not isinstance(value, Mapping):
        raise ConfigError(f"model {name!r} is {value!r}; give an alias or a path, or a table with `model`")
    try:
        return ModelSource(**{str(key): given for key, given in value.items()})
    except ConfigError as error:
        raise ConfigError(f"model {name!r}: {error}") from None
