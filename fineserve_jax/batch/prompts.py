"""The file of prompts: refused before any work if it cannot be read, then read line by line."""

import io
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from fineserve_jax.batch.content import SNIFFED, what_is_wrong
from fineserve_jax.errors import ConfigError

STDIN = "-"
COUNT_BLOCK = 1 << 20


class PromptFile:
    """Lines of a file, or of stdin for "-", read as they are wanted.

    Raises:
        ConfigError: a path that is missing, is no file, cannot be read, or begins as no JSON lines do.

    Attributes:
        num_lines: how many there are; None where that cannot be known beforehand.
        is_empty: known to hold nothing.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.num_lines: int | None = None
        self._file = _stdin() if self.path == STDIN else _open(path)
        name = "stdin" if self.path == STDIN else f"the input {path}"
        try:
            begin, seekable = _first_bytes(self._file), self._file.seekable()
        except OSError as error:
            raise ConfigError(
                f"{name} cannot be read: {error.strerror}; give a file of JSON lines, or - for stdin"
            ) from None
        self.is_empty = seekable and not begin.strip() and len(begin) < SNIFFED
        if (wrong := what_is_wrong(begin, whole=seekable)) is not None:
            self.__exit__()
            raise ConfigError(f"{name} {wrong}")
        if self.path != STDIN and seekable:
            self.num_lines = self._count_lines()

    def is_same_file(self, path: str | Path) -> bool:
        """Whether `path` names the very file that is read here."""
        return self.path != STDIN and os.path.exists(path) and os.path.samefile(self.path, path)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self.path != STDIN:
            self._file.close()

    def _count_lines(self) -> int:
        """Takes a fraction of a second per gigabyte, and lets progress say how much is left."""
        lines, last = 0, b"\n"
        while block := self._file.read(COUNT_BLOCK):
            lines, last = lines + block.count(b"\n"), block[-1:]
        self._file.seek(0)
        return lines + (last != b"\n")


def _stdin() -> BinaryIO:
    if sys.stdin is None:
        raise ConfigError("stdin is closed; give a file of JSON lines, or pipe one in")
    return sys.stdin.buffer


def _open(path: str | Path) -> BinaryIO:
    if os.path.isdir(path):  # unlike Path.is_dir, takes any name
        raise ConfigError(f"the input {path} is a directory; give a file of JSON lines, or - for stdin")
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise ConfigError(
            f"the input {path} cannot be read: {error.strerror}; give a file of JSON lines, or - for stdin"
        ) from None


def _first_bytes(file: BinaryIO) -> bytes:
    """How the file goes on, of a pipe what its writer has sent; they are there to be read again."""
    if not file.seekable():
        return file.peek(SNIFFED) if isinstance(file, io.BufferedReader) else b""
    place = file.tell()
    begin = file.read(SNIFFED)
    file.seek(place)
    return begin
