"""Checks requests as an engine would, without one: no weights are read, and no memory is taken on a device."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fineserve_jax.engine.build import KnownModel, build_books
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_settings import load_models, model_sources
from fineserve_jax.engine.prepare import named_model, prepare_request
from fineserve_jax.loaders.load import describe_model
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.quotas import Quotas


class RequestChecker:
    """Knows what an engine of these models and settings would refuse.

    Args:
        model: an alias or a path, or several as `model_sources` takes them.
        config: the engine's settings.

    Raises:
        ModelLoadError: a model whose configuration or tokenizer cannot be found, read or used.
        ConfigError: settings that cannot be honoured.
    """

    def __init__(self, model: str | Path | Mapping[str, Any], config: EngineConfig) -> None:
        if isinstance(model, Mapping):
            settings = model_sources(model)
            models = load_models(settings, config, describe_model)
        else:
            settings = {}
            described = describe_model(model, config.weights)
            models = {described.name: described}
        books = build_books(models, config, settings)
        self.models, self._kv = books.models, books.kv
        self._quotas = Quotas(books.kv, config.quotas, config.growth_reserve_pages)

    def served(self, model: str | None = None) -> KnownModel:
        """The model of that name; None stands for the only one. Raises `RequestError`."""
        return named_model(self.models, model)

    def check(self, token_ids: Sequence[int], sampling: SamplingParams, options: RequestOptions) -> None:
        """Raises `RequestError` for a request that `Engine.prepare` would refuse."""
        prepare_request(self.models, self._kv, self._quotas, token_ids, sampling, options)
