"""LLM inference in JAX whose requests keep their KV caches in different precisions, in one batch and one memory."""

from typing import TYPE_CHECKING, Any

from fineserve_jax.errors import ConfigError, FineServeError, ModelLoadError, RequestError
from fineserve_jax.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fineserve_jax.engine.engine import Engine
    from fineserve_jax.engine.engine_config import EngineConfig
    from fineserve_jax.llm import LLM

__all__ = [
    "LLM",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "FineServeError",
    "ModelLoadError",
    "RequestError",
    "SamplingParams",
]

_NEED_JAX = {"LLM": "llm", "Engine": "engine.engine", "EngineConfig": "engine.engine_config"}


def __getattr__(name: str) -> Any:
    """Imports what needs jax when it is first asked for: the host's half is usable without."""
    if name not in _NEED_JAX:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_NEED_JAX[name]}"), name)
