"""`fineserve-jax fetch` and `fineserve-jax convert`: getting models, and making them start quickly."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from fineserve_jax import loaders


def fetch(alias: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="ALIAS")], /) -> None:
    """Download a model into the cache, verify its checksum, and print where it is.

    Args:
        alias: name of the model, e.g. smollm2-135m.
    """
    print(loaders.fetch(alias))


def convert(
    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    directory: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIRECTORY")],
    /,
    *,
    weights: Literal["fp32", "bf16", "int8", "int4"] = "int8",
) -> None:
    """Write a model as an Orbax checkpoint that starts quickly, its weights in the precision they will be
    used in.

    Args:
        source: an alias, a .gguf file or a Hugging Face directory.
        directory: where to write; must not exist, or be empty.
        weights: precision of the weights.
    """
    model = loaders.convert(source, directory, weights)
    size = sum(file.stat().st_size for file in directory.rglob("*") if file.is_file())
    print(f"{directory}: {model.name}, {model.weights} weights, {size / 2**20:.0f} MiB")
