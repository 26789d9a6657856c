"""From what names a model, or several, to an engine that serves them."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_settings import load_models, model_sources
from fineserve_jax.errors import ConfigError
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.runner.mesh import DeviceGroup, device_group

Load = Callable[[str | Path, str | None, DeviceGroup], LoadedModel]
"""Of a source in a weight format, onto devices."""


def load_engine(
    model: str | Path | Mapping[str, Any],
    config: EngineConfig,
    devices: Sequence[jax.Device] | None = None,
    load: Load | None = None,
) -> Engine:
    """Loads `model`, an alias or a path, or several as `model_sources` takes them, and makes an engine of it.

    Args:
        devices: the first `tensor_parallel` of these compute its steps; None: of all that JAX finds.
        load: how weights are had; None: they are read.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: settings that cannot be honoured.
    """
    use_compilation_cache()
    group, load = device_group(config.tensor_parallel, devices), load or load_model
    if not isinstance(model, Mapping):
        return Engine(load(model, config.weights, group), config, devices=group.devices)
    sources = model_sources(model)
    models = load_models(sources, config, lambda source, weights: load(source, weights, group))
    return Engine(models, config, settings=sources, devices=group.devices)


def load_from(model: str | None, models: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> Engine:
    """The engine of a front door, which takes one model, or several by name.

    Args:
        settings: the fields of `EngineConfig`.

    Raises:
        ModelLoadError, ConfigError: see `load_engine`; or neither model nor models, or both.
    """
    if (model is None) == (models is None):
        given = "neither model nor models" if model is None else "both model and models"
        raise ConfigError(f"the LLM was given {given}; give one model, or several by name as models")
    config = EngineConfig(**settings)
    return load_engine(model_sources(models or {}) if model is None else model, config)
