"""The tiny model, and one engine with it for all tests of the batch job."""

import pytest
from tiny_model import OPTIONS, write_tiny_model

from fineserve_jax import Engine, EngineConfig
from fineserve_jax.loaders import load_model


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation):
    """All programs of these tests."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def engine(tiny_model):
    return Engine(load_model(tiny_model, OPTIONS["weights"]), EngineConfig(**OPTIONS))
