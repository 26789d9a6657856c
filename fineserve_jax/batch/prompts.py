"""The file of prompts: refused before any work if it cannot be read, then read line by line."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Self

from fineserve_jax.errors import ConfigError

STDIN = "-"
COUNT_BLOCK = 1 << 20


class PromptFile:
    """Lines of a file, or of stdin for "-", read as they are wanted.

    Raises:
        ConfigError: a path that is missing, is no file, or cannot be read.

    Attributes:
        num_lines: how many there are; None where that cannot be known beforehand.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.num_lines: int | None = None
        if self.path == STDIN:
            self._file: BinaryIO = sys.stdin.buffer
            return
        if os.path.isdir(path):
            raise ConfigError(f"the input {path} is a directory; give a file of JSON lines, or - for stdin")
        try:
            self._file = Path(path).open("rb")  # noqa: SIM115, closed by __exit__
        except OSError as error:
            raise ConfigError(
                f"the input {path} cannot be read: {error.strerror}; give a file of JSON lines, or - for stdin"
            ) from None
        if self._file.seekable():
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
