"""The file of answers: refused before any work if it cannot be written, then written row by row."""

import json
import os
import stat
import sys
from collections.abc import Hashable
from pathlib import Path
from typing import Any, BinaryIO, Self

from fineserve_jax.batch.row_ids import id_key
from fineserve_jax.errors import ConfigError, FineServeError

STDOUT = "-"


class AnswerFile:
    """Where answer and error rows go, each written in one piece as soon as it is known.

    Opening it checks that it can be written and leaves what is there untouched; `begin` then drops what is to
    be dropped. A file that is created and never begun is removed again.

    Args:
        path: a file, or "-" for stdout.
        resume: go on with a file that an earlier run left, see `answered`.
        overwrite: drop what an existing file holds.

    Raises:
        ConfigError: a path that cannot be written, an existing file and neither `resume` nor `overwrite`, or,
            to be resumed, one that is no file of answers.

    Attributes:
        answered: with `resume`, the `id_key` of each row that the file has an answer to.
        failed: with `resume`, (line, error) of its error rows.
    """

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path, self.overwrite = str(path), overwrite
        self.answered: set[Hashable] = set()
        self.failed: set[tuple[int, str]] = set()
        self._keep_bytes, self._created, self._begun = 0, False, False
        if resume and overwrite:
            raise ConfigError("--resume keeps what the output holds and --overwrite drops it; give one of them")
        self._file = self._open_stdout(resume) if self.path == STDOUT else self._open(Path(path), resume, overwrite)

    # -- opening -----------------------------------------------------------------------------------------

    def _open_stdout(self, resume: bool) -> BinaryIO:
        if resume:
            raise ConfigError("stdout cannot be resumed; give an output file with -o")
        if sys.stdout is None:
            raise ConfigError("stdout is closed; give an output file with -o, or open it")
        return sys.stdout.buffer

    def _open(self, path: Path, resume: bool, overwrite: bool) -> BinaryIO:
        if os.path.isdir(path):  # unlike Path.is_dir, takes any name
            raise ConfigError(f"the output {path} is a directory; give a file in it, e.g. {path / 'answers.jsonl'}")
        if not os.path.isdir(path.parent):
            raise ConfigError(f"the output {path} cannot be written: there is no directory {path.parent}; create it")
        exists = os.path.exists(path)
        regular = not exists or stat.S_ISREG(path.stat().st_mode)
        if exists and regular and not resume and not overwrite:
            raise ConfigError(
                f"the output {path} exists; go on with it by --resume, replace it by --overwrite, or name another"
            )
        if resume and not regular:
            raise ConfigError(f"the output {path} is no regular file and cannot be resumed; name another")
        if exists and resume:
            self._read_earlier(path)
        try:
            # Unbuffered: every write reaches the system at once.
            file = path.open("ab" if exists else "xb", buffering=0)
        except OSError as error:
            raise ConfigError(f"the output {path} cannot be written: {error.strerror}; name another") from None
        self._created = not exists
        return file

    def _read_earlier(self, path: Path) -> None:
        """Notes what was answered. A last line without an end is torn: a run was killed as it wrote it."""
        try:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        return
                    self._note(path, number, line)
                    self._keep_bytes += len(line)
        except OSError as error:
            raise ConfigError(f"the output {path} cannot be read to resume it: {error.strerror}") from None

    def _note(self, path: Path, number: int, line: bytes) -> None:
        try:
            row = json.loads(line)
            if "error" in row:
                self.failed.add((row["line"], row["error"]))
            elif row["id"] is None:
                raise ValueError("an answer bears its row's id")
            else:
                self.answered.add(id_key(row["id"]))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise ConfigError(
                f"line {number} of {path} is no answer, so it cannot be resumed; name another output, or mend the line"
            ) from None

    # -- writing -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Drops what is not to be kept. Call it when nothing can go wrong any more but single rows."""
        self._begun = True
        if self.path == STDOUT or not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
            return
        self._file.truncate(0 if self.overwrite else self._keep_bytes)

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row so that others can read it at once. It must hold neither NaN nor infinity, which JSON lacks.

        Raises:
            FineServeError: the disk is full, or the system refuses for another reason.
        """
        try:
            line = json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        except UnicodeEncodeError:  # an id with half a surrogate pair
            line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            self._write_all(line)
        except BrokenPipeError:
            raise
        except OSError as error:
            if self.path == STDOUT:
                raise FineServeError(
                    f"cannot write to stdout: {error.strerror}; give an output file, which can be resumed"
                ) from None
            raise FineServeError(
                f"cannot write to {self.path}: {error.strerror}; what it holds so far is sound, "
                "so make room and run the same command with --resume"
            ) from None

    def _write_all(self, line: bytes) -> None:
        rest = memoryview(line)
        while rest:
            rest = rest[self._file.write(rest) :]
        self._file.flush()

    def close(self) -> None:
        if self.path == STDOUT:
            return
        self._file.close()
        if self._created and not self._begun:
            Path(self.path).unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
