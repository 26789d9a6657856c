"""Fixtures of the engine tests."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_cases import random_model

from fineserve_jax.engine import load as load_engine
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import LoadedModel

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("request", "batch", "models")]


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation: None) -> None:
    """All programs of these tests, but in files that compare numbers."""


@pytest.fixture(scope="session")
def tiny_model() -> LoadedModel:
    return random_model()


@pytest.fixture(scope="session")
def make_engine(tiny_model: LoadedModel) -> Callable[..., Engine]:
    def make(clock: Callable[[], float] = time.monotonic, **settings: Any) -> Engine:
        defaults = {"max_seq_len": 256, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "8MiB"}
        defaults["kv_formats"] = ("fp32", "bf16", "int8", "int4")  # each adds a loop to every program
        engine = Engine(tiny_model, EngineConfig(**(defaults | settings)), clock)
        engine.runner.use_formats(engine.config.served_formats)  # so that all tests share compiled programs
        return engine

    return make


@pytest.fixture(scope="module")
def make_llm(tiny_model: LoadedModel) -> Iterator[Callable[..., LLM]]:
    """LLMs of the tiny model, all with the same programs."""
    formats = ("bf16", "int8", "int4")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_engine, "load_model", lambda *_: tiny_model)

        def make(**settings: Any) -> LLM:
            defaults = {"max_seq_len": 128, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "4MiB"}
            llm = LLM("tiny", **(defaults | {"kv_formats": formats} | settings))
            llm.engine.runner.use_formats(formats)
            return llm

        yield make
