"""What a compiled case depends on, as one short text: a case is compiled again only when that has changed."""

import hashlib
import os
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

# Lowered programs then name no files and lines, so that neither a comment nor another folder changes a fingerprint.
ENVIRONMENT = {"JAX_TRACEBACK_IN_LOCATIONS_LIMIT": "0"}
COMPILER_OPTIONS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def fingerprint(
    lowered: Iterable[str], target: Any, packages: Iterable[str], readers: Iterable[str], tools: Iterable[str] = ()
) -> str:
    """A hash of everything that a case's result is made from, traffic aside.

    Args:
        lowered: the programs, as they are handed to the chip's compiler.
        target: the chip; its repr counts.
        packages: installed packages that compile.
        readers: files of this folder that read compilers' outputs.
        tools: versions of compilers that are no packages.
    """
    options = [f"{name}={os.environ.get(name, '')}" for name in COMPILER_OPTIONS]
    versions = [f"{package} {version(package)}" for package in packages]
    sources = [Path(__file__).with_name(name).read_text() for name in readers]
    parts = [*lowered, repr(target), *options, *versions, *sources, *tools]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
