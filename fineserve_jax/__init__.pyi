"""The public interface: what `fineserve_jax` offers by name, and where each is defined.

Type checkers read this file, and `__init__.py` imports from it what it is asked for.
"""

from fineserve_jax.async_llm import AsyncLLM
from fineserve_jax.engine.embedding import PromptEmbedding
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fineserve_jax.engine.perplexity import Perplexity, measure_perplexity
from fineserve_jax.engine.scoring import CompletionScore
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.observers import RowOutcome
from fineserve_jax.entrypoints.batch.predictor import FineServePredictor
from fineserve_jax.entrypoints.batch.report_sections import ReportSection
from fineserve_jax.entrypoints.batch.report_sections import register as register_report_section
from fineserve_jax.errors import (
    ConfigError,
    DeadEndError,
    EngineError,
    FineServeError,
    ModelLoadError,
    NonFiniteError,
    RequestError,
)
from fineserve_jax.fleet.plan import EnginePlan, Plan
from fineserve_jax.kv.quotas import Quota
from fineserve_jax.llm import LLM
from fineserve_jax.loaders.chat import ChatOptions
from fineserve_jax.loaders.load import load_model
from fineserve_jax.loaders.loaded_model import LoadedModel
from fineserve_jax.models.family import Family as ModelFamily
from fineserve_jax.models.registry import register_family as register_model_family
from fineserve_jax.models.tensor_layout import Joined as JoinedTensors
from fineserve_jax.models.tensor_layout import TensorLayout
from fineserve_jax.pallas_kernels.format_sizes import Granularity
from fineserve_jax.pallas_kernels.formats import FORMATS as KV_FORMATS
from fineserve_jax.pallas_kernels.formats import (
    Codec,
    EncodedVectors,
    KVFormat,
    PackedLanes,
    UnpackedVectors,
    bit_packing,
)
from fineserve_jax.pallas_kernels.formats import register as register_kv_format
from fineserve_jax.request.logits_processor import LogitsProcessor
from fineserve_jax.request.logits_processor import register as register_logits_processor
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.scheduler.policies import POLICIES, Policy, PolicyContext

__version__: str

__all__ = [
    "KV_FORMATS",
    "LLM",
    "POLICIES",
    "AsyncLLM",
    "ChatOptions",
    "Codec",
    "CompletionOutput",
    "CompletionScore",
    "ConfigError",
    "DeadEndError",
    "EncodedVectors",
    "Engine",
    "EngineConfig",
    "EngineError",
    "EnginePlan",
    "EngineStats",
    "FineServeError",
    "FineServePredictor",
    "Granularity",
    "JoinedTensors",
    "KVFormat",
    "LoadedModel",
    "LogitsProcessor",
    "ModelFamily",
    "ModelLoadError",
    "NonFiniteError",
    "PackedLanes",
    "Perplexity",
    "Plan",
    "Policy",
    "PolicyContext",
    "PromptEmbedding",
    "Quota",
    "ReportSection",
    "Request",
    "RequestError",
    "RequestMetrics",
    "RequestOptions",
    "RequestOutput",
    "RowOutcome",
    "SamplingParams",
    "StructuredOutputsParams",
    "TensorLayout",
    "UnpackedVectors",
    "__version__",
    "bit_packing",
    "load_model",
    "measure_perplexity",
    "register_kv_format",
    "register_logits_processor",
    "register_model_family",
    "register_report_section",
]
