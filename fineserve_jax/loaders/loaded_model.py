"""What every loader returns: a model with its parameters and its tokenizer."""

from __future__ import annotations

import dataclasses

from fineserve_jax.loaders.pooling_settings import PoolingSettings
from fineserve_jax.loaders.tokenizer import Tokenizer
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.params import Params


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model ready to run.

    name: what the source calls it (alias, file stem or directory name).
    params: nested dict of jax arrays, the tree of `models.abstract_params(config, weights)`.
    weights: how matrices are stored: fp32, bf16, int8 or int4.
    pooling: how it makes vectors of texts, if it is made for that; None: it is a language model.
    """

    name: str
    config: ModelConfig
    params: Params
    tokenizer: Tokenizer
    weights: str
    pooling: PoolingSettings | None = None
