"""From what names a model, or several, to an engine that serves them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_settings import load_models, model_sources
from fineserve_jax.loaders import load_model


def load_engine(model: str | Path | Mapping[str, Any], config: EngineConfig) -> Engine:
    """Loads `model`, an alias or a path, or several as `model_sources` takes them, and makes an engine of it.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: settings that cannot be honoured.
    """
    return engine_maker(model, config)()


def engine_maker(model: str | Path | Mapping[str, Any], config: EngineConfig) -> Callable[[], Engine]:
    """Loads `model` as `load_engine` does; what it returns makes engines of it, one after another."""
    use_compilation_cache()
    if not isinstance(model, Mapping):
        loaded = load_model(model, config.weights)
        return lambda: Engine(loaded, config)
    sources = model_sources(model)
    models = load_models(sources, config)
    return lambda: Engine(models, config, settings=sources)
