"""Plans of the batch tests' tiny model."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("batch", "server", "engine")]

from tiny_model import OPTIONS, write_tiny_model

from fineserve_jax.fleet import Plan


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation: None) -> None:
    """Nothing here depends on fast programs."""


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def make_plan(directory: Path) -> Callable[..., Plan]:
    """Plans of models that are all the tiny one, with settings whose programs other tests have, too."""

    def make(engines: list[dict[str, Any]], **models: Any) -> Plan:
        settings = OPTIONS | {"kv_formats": ["int4", "int8"]}
        sources = {name: {"model": str(directory), **own} for name, own in models.items()}
        return Plan(version=1, models=sources, settings=settings, engines=engines)

    return make
