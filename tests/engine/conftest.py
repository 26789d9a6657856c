"""Fixtures of the engine tests."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import random_model

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import LoadedModel

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("structured", "batch")]


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    return random_model()


@pytest.fixture
def make_engine(tiny_model: LoadedModel) -> Callable[..., Engine]:
    def make(**settings: Any) -> Engine:
        defaults = {"max_seq_len": 256, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "8MiB"}
        defaults["kv_formats"] = ("fp32", "bf16", "int8", "int4")  # each adds a loop to every program
        engine = Engine(tiny_model, EngineConfig(**(defaults | settings)))
        engine.runner.use_formats(engine.config.served_formats)  # so that all tests share compiled programs
        return engine

    return make
