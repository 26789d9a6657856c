"""One engine with the batch tests' tiny model, for all servers of a process."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))

from serving import Running, check_nothing_is_left, serving
from tiny_model import OPTIONS, write_tiny_model

from fineserve_jax.async_llm import AsyncLLM


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation: None) -> None:
    """Nothing here depends on fast programs."""


@pytest.fixture(scope="session")
def llm(tmp_path_factory: pytest.TempPathFactory) -> AsyncLLM:
    directory = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    formats: dict[str, Any] = {"kv_formats": ("int4", "int8")}
    return AsyncLLM(str(directory), **(OPTIONS | formats))


@pytest.fixture(scope="module")
def server(llm: AsyncLLM) -> Iterator[Running]:
    with serving(llm) as running:
        yield running
    check_nothing_is_left(llm)
