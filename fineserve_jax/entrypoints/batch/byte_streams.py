"""The bytes of an input, wherever it lies and however it is compressed."""

import bz2
import glob
import gzip
import io
import lzma
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, cast

from fineserve_jax.entrypoints.batch.content import SNIFFED, compression
from fineserve_jax.errors import ConfigError

STDIN = "-"
GIVE = "give a file of JSON lines, CSV or Parquet, or - for stdin"
CANNOT_READ = (OSError, EOFError, lzma.LZMAError)
"""What reading raises where a disk, a network or what was compressed is broken."""


def is_remote(path: str) -> bool:
    """Whether it is an address for fsspec, such as s3://bucket/prompts.jsonl."""
    return "://" in path


def expand(path: str) -> list[str]:
    """The inputs that an argument names: itself, or what a pattern such as day-*.jsonl matches, sorted.

    Raises:
        ConfigError: a pattern that matches nothing, or an address whose file system cannot be reached.
    """
    if not glob.has_magic(path) or os.path.exists(path):
        return [path]
    found = _remote(path, lambda system, inner: [system.unstrip_protocol(name) for name in system.glob(inner)])
    paths = sorted(glob.glob(path, recursive=True) if found is None else found)
    if not paths:
        raise ConfigError(f"the input {path} matches no file; {GIVE}")
    return paths


def open_bytes(path: str) -> BinaryIO:
    """The input as it lies, from its start.

    Raises:
        ConfigError: a path that is missing, is no file, or cannot be read.
    """
    if path == STDIN:
        if sys.stdin is None:
            raise ConfigError("stdin is closed; give a file of JSON lines, or pipe one in")
        return sys.stdin.buffer
    if os.path.isdir(path):  # unlike Path.is_dir, takes any name
        raise ConfigError(f"the input {path} is a directory; give a file in it, or a pattern such as {path}/*.jsonl")
    try:
        remote = _remote(path, lambda system, inner: system.open(inner, "rb"))
        return cast(BinaryIO, remote) if remote is not None else Path(path).open("rb")
    except (OSError, ValueError) as error:  # a path with a NUL byte is a ValueError
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ConfigError(f"the input {path} cannot be read: {reason}; {GIVE}") from None


def remote_version(path: str) -> str:
    """What changes with the file at an address, as its file system tells it."""
    return str(_remote(path, lambda system, inner: system.checksum(inner)))


def unpacked(stream: BinaryIO) -> BinaryIO:
    """The stream from where it stands, unpacked if it is compressed.

    Raises:
        ConfigError: zstd, and pyarrow is not installed.
    """
    packed = compression(first_bytes(stream))
    if packed is None:
        return stream
    openers: dict[str, Callable[[BinaryIO], Any]] = {
        "gzip": gzip.open,
        "bzip2": bz2.open,
        "xz": lzma.open,
        "zstd": _unpack_zstd,
    }
    return io.BufferedReader(openers[packed](stream), SNIFFED)


def first_bytes(stream: BinaryIO) -> bytes:
    """How the stream goes on, of a pipe what its writer has sent; they are there to be read again."""
    if not stream.seekable():
        return stream.peek(SNIFFED) if isinstance(stream, io.BufferedReader) else b""
    place = stream.tell()
    begin = stream.read(SNIFFED)
    stream.seek(place)
    return begin


def _unpack_zstd(stream: BinaryIO) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ConfigError(
            "an input is compressed with zstd, for which pyarrow is needed: pip install 'fineserve-jax[files]', or "
            "pipe it in: zstd -dc FILE | fineserve-jax batch -i - ..."
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(stream, "r"), "zstd")


def _remote(path: str, use: Callable[[Any, str], Any]) -> Any:
    """What `use` makes of the file system of an address and the path in it; None for a path on this machine.

    Raises:
        ConfigError: fsspec, or what it needs for that address, is not installed; or the system cannot be reached.
    """
    if not is_remote(path):
        return None
    try:
        import fsspec
    except ImportError:
        raise ConfigError(
            f"the input {path} is an address, for which fsspec is needed: pip install 'fineserve-jax[remote]'"
        ) from None
    try:
        return use(*fsspec.core.url_to_fs(path))
    except (ImportError, ValueError) as error:
        raise ConfigError(f"the input {path} cannot be reached: {error}") from None
    except FileNotFoundError:
        raise ConfigError(f"the input {path} cannot be read: there is no such file; {GIVE}") from None
    except Exception as error:  # each file system has errors of its own
        raise ConfigError(f"the input {path} cannot be read: {type(error).__name__}: {error}") from None
