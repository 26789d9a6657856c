"""LLM inference in JAX whose requests keep their KV caches in different precisions, in one batch and one memory.

What is named in `__all__` is the public interface. It is imported when it is first asked for, so that importing the
package costs nothing and the scheduler, the KV books and the simulator are usable without jax.
"""

from typing import TYPE_CHECKING, Any

from fineserve_jax.errors import ConfigError, FineServeError, ModelLoadError, NonFiniteError, RequestError

if TYPE_CHECKING:
    from fineserve_jax.engine.engine import Engine
    from fineserve_jax.engine.engine_config import EngineConfig
    from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
    from fineserve_jax.engine.perplexity import Perplexity, measure_perplexity
    from fineserve_jax.engine.stats import EngineStats
    from fineserve_jax.kv.quotas import Quota
    from fineserve_jax.llm import LLM
    from fineserve_jax.loaders import LoadedModel, load_model
    from fineserve_jax.models.family import Family as ModelFamily
    from fineserve_jax.models.registry import register_family as register_model_family
    from fineserve_jax.pallas_kernels.formats import FORMATS as KV_FORMATS
    from fineserve_jax.pallas_kernels.formats import (
        Granularity,
        KVFormat,
        PackedLanes,
        PageVectors,
        PageWords,
        bit_packing,
    )
    from fineserve_jax.pallas_kernels.formats import register as register_kv_format
    from fineserve_jax.request import Request
    from fineserve_jax.request_options import RequestOptions
    from fineserve_jax.sampling_params import SamplingParams
    from fineserve_jax.scheduler.policies import POLICIES, Policy, PolicyContext

    __version__: str

__all__ = [
    "KV_FORMATS",
    "LLM",
    "POLICIES",
    "CompletionOutput",
    "ConfigError",
    "Engine",
    "EngineConfig",
    "EngineStats",
    "FineServeError",
    "Granularity",
    "KVFormat",
    "LoadedModel",
    "ModelFamily",
    "ModelLoadError",
    "NonFiniteError",
    "PackedLanes",
    "PageVectors",
    "PageWords",
    "Perplexity",
    "Policy",
    "PolicyContext",
    "Quota",
    "Request",
    "RequestError",
    "RequestMetrics",
    "RequestOptions",
    "RequestOutput",
    "SamplingParams",
    "__version__",
    "bit_packing",
    "load_model",
    "measure_perplexity",
    "register_kv_format",
    "register_model_family",
]

# Where each name is defined, as module:name.
_PLACES = {
    "CompletionOutput": "engine.outputs:CompletionOutput",
    "Engine": "engine.engine:Engine",
    "EngineConfig": "engine.engine_config:EngineConfig",
    "EngineStats": "engine.stats:EngineStats",
    "Granularity": "pallas_kernels.formats:Granularity",
    "KVFormat": "pallas_kernels.formats:KVFormat",
    "KV_FORMATS": "pallas_kernels.formats:FORMATS",
    "LLM": "llm:LLM",
    "LoadedModel": "loaders:LoadedModel",
    "ModelFamily": "models.family:Family",
    "POLICIES": "scheduler.policies:POLICIES",
    "PageVectors": "pallas_kernels.formats:PageVectors",
    "PageWords": "pallas_kernels.formats:PageWords",
    "Perplexity": "engine.perplexity:Perplexity",
    "PackedLanes": "pallas_kernels.formats:PackedLanes",
    "Policy": "scheduler.policies:Policy",
    "PolicyContext": "scheduler.policies:PolicyContext",
    "Quota": "kv.quotas:Quota",
    "Request": "request:Request",
    "RequestMetrics": "engine.outputs:RequestMetrics",
    "RequestOptions": "request_options:RequestOptions",
    "RequestOutput": "engine.outputs:RequestOutput",
    "SamplingParams": "sampling_params:SamplingParams",
    "bit_packing": "pallas_kernels.formats:bit_packing",
    "load_model": "loaders:load_model",
    "measure_perplexity": "engine.perplexity:measure_perplexity",
    "register_kv_format": "pallas_kernels.formats:register",
    "register_model_family": "models.registry:register_family",
}


def __getattr__(name: str) -> Any:
    import importlib.metadata

    if name == "__version__":
        return importlib.metadata.version("fineserve-jax")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
