"""Fixtures of the engine tests."""

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_cases import SETTINGS, random_model

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
        engine = Engine(tiny_model, EngineConfig(**(SETTINGS | settings)), clock)
        engine.runner.use_formats(engine.config.served_formats)  # so that all tests share compiled programs
        return engine

    return make


@pytest.fixture(scope="module")
def make_llm(tiny_model: LoadedModel) -> Iterator[Callable[..., LLM]]:
    """LLMs of the tiny model, or of one that is given, with the same programs as those of `make_engine`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load_engine, "use_compilation_cache", lambda: None)

        def make(model: LoadedModel = tiny_model, **settings: Any) -> LLM:
            patch.setattr(load_engine, "load_model", lambda *_: model)
            llm = LLM("tiny", **(SETTINGS | settings))
            llm.engine.runner.use_formats(SETTINGS["kv_formats"])
            return llm

        yield make
