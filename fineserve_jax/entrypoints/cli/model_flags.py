"""Which models a command works with: `--model`, and `model` or `models` of a YAML file.

--model MODEL                     the only model; where the file has a model of that name, that one
--model NAME=MODEL[:WEIGHTS]      one of several, by the name that rows give
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, get_args

from fineserve_jax.engine.engine_config import Weights
from fineserve_jax.engine.model_settings import ModelSource, model_sources
from fineserve_jax.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m"

Models: TypeAlias = ModelSource | dict[str, ModelSource]
"""One model that needs no name, or some by name."""


def models_of_file(path: Path | None, settings: Mapping[str, Any]) -> Models:
    """What a settings file says of models, or the default. Raises `ConfigError` if that is wrong."""
    if "model" in settings and "models" in settings:
        raise ConfigError(f"{path} sets both `model` and `models`; keep one of them")
    if "models" in settings:
        try:
            return model_sources(settings["models"])
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    model = settings.get("model", DEFAULT_MODEL)
    if not isinstance(model, str):
        raise ConfigError(f"model={model!r} in {path} is not text; give an alias or a path")
    return ModelSource(model=model)


def choose_model(flag: str | None, in_file: Models) -> ModelSource:
    """The model of a command that takes one: the flag's, or else the file's.

    Raises:
        ConfigError: a file with several models, and no flag that says which.
    """
    if flag is not None:
        named = {} if isinstance(in_file, ModelSource) else in_file
        return named.get(flag) or ModelSource(model=flag)
    if isinstance(in_file, ModelSource):
        return in_file
    if len(in_file) > 1:
        raise ConfigError(
            f"the configuration has several models, and this command takes one; give --model with one of "
            f"{', '.join(in_file)}"
        )
    return next(iter(in_file.values()))


def choose_models(flags: Sequence[str], in_file: Models) -> Models:
    """The models of a command that takes several; a single one that needs no name comes by itself.

    Raises:
        ConfigError: several models of which one has no name, or a name that is given twice.
    """
    if not flags:
        return in_file
    named: dict[str, ModelSource] = {}
    for flag in flags:
        name, source = _parse(flag, {} if isinstance(in_file, ModelSource) else in_file)
        if name is None and len(flags) == 1:
            return source
        if name is None:
            raise ConfigError(f"--model {flag} is one of several and has no name; write --model NAME={flag}")
        if name in named:
            raise ConfigError(f"two models are called {name!r}; give each --model a name of its own")
        named[name] = source
    return named


def _parse(flag: str, in_file: Mapping[str, ModelSource]) -> tuple[str | None, ModelSource]:
    """A flag as name, if it has one, and model. A name has no slash, so that paths may have an equals sign."""
    if flag in in_file:
        return flag, in_file[flag]
    name, equals, source = flag.partition("=")
    if not equals or "/" in name:
        return None, ModelSource(model=flag)
    model, _, weights = source.rpartition(":")
    if model and weights in get_args(Weights):
        return name, ModelSource.model_validate({"model": model, "weights": weights})
    return name, ModelSource(model=source)
