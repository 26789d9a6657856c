"""Commands run in this process, on the batch tests' tiny model."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "batch"))
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

from tiny_model import OPTIONS, write_tiny_model

from fineserve_jax.entrypoints.cli import main

OPTION_FLAGS = [word for name, value in OPTIONS.items() for word in (f"--{name.replace('_', '-')}", str(value))]


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly(quick_compilation):
    """All programs of these tests."""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def run(capsys, tiny_model):
    """Runs a command; returns its exit status, stdout and stderr. `MODEL` stands for the tiny model's options."""

    def run(*arguments):
        model = ["--model", tiny_model, *OPTION_FLAGS]
        words = [word for given in arguments for word in (model if given == "MODEL" else [given])]
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run
