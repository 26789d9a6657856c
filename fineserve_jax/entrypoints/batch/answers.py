"""The file of answers: refused before any work if it cannot be written, then written line by line."""

import errno
import os
import stat
import sys
from pathlib import Path
from typing import BinaryIO, Self, cast

from fineserve_jax.entrypoints.batch.byte_streams import is_remote
from fineserve_jax.entrypoints.batch.lock import OutputLock
from fineserve_jax.errors import ConfigError, FineServeError

STDOUT = "-"
OTHER_FORMATS = (".gz", ".zst", ".bz2", ".xz", ".parquet", ".csv")


class AnswerFile:
    """Where answer and error rows go, each written in one piece as soon as it is known.

    Opening it checks that it can be written, makes this process its only writer, and leaves what is there untouched;
    `begin` then drops what is to be dropped, or creates the file.

    Args:
        path: a file, or "-" for stdout.
        resume: go on with a file that an earlier run left.
        overwrite: drop what an existing file holds.

    Raises:
        ConfigError: a path that cannot be written, an existing file and neither `resume` nor `overwrite`, one that
            another process writes, or, to be resumed, one that is no regular file.

    Attributes:
        is_regular: whether it is a file that can be resumed.
        existed: whether it was there.
        end: its length in bytes, as far as it is written here.
    """

    def __init__(self, path: str | Path, resume: bool = False, overwrite: bool = False) -> None:
        self.path = str(path)
        self.is_regular, self.existed, self.end = False, False, 0
        self._lock: OutputLock | None = None
        self._opened: BinaryIO | None = None
        if resume and overwrite:
            raise ConfigError("--resume keeps what the output holds and --overwrite drops it; give one of them")
        if self.path == STDOUT:
            self._opened = self._open_stdout(resume)
            return
        _check_path(self.path, Path(path))
        self.is_regular = not os.path.exists(path) or stat.S_ISREG(os.stat(path).st_mode)
        if resume and not self.is_regular:
            raise ConfigError(f"the output {path} is no regular file and cannot be resumed; name another")
        if self.is_regular:
            self._lock = OutputLock(Path(path))
        try:
            self._check_existing(resume, overwrite)
            if self.existed:
                self._opened = self._open("ab")
        except BaseException:
            self._unlock()
            raise

    def _open_stdout(self, resume: bool) -> BinaryIO:
        if resume:
            raise ConfigError("stdout cannot be resumed; give an output file with -o")
        if sys.stdout is None:
            raise ConfigError("stdout is closed; give an output file with -o, or open it")
        return sys.stdout.buffer

    def _check_existing(self, resume: bool, overwrite: bool) -> None:
        self.existed = os.path.exists(self.path)
        if self.existed and self.is_regular and not resume and not overwrite:
            raise ConfigError(
                f"the output {self.path} exists; go on with it by --resume, replace it by --overwrite, or name another"
            )

    def _open(self, mode: str) -> BinaryIO:
        try:
            # Unbuffered: every write reaches the system at once.
            return cast(BinaryIO, open(self.path, mode, buffering=0))
        except OSError as error:
            raise ConfigError(f"the output {self.path} cannot be written: {error.strerror}; name another") from None

    def begin(self, keep_bytes: int = 0) -> None:
        """Drops all but the first bytes. Call it when nothing can go wrong any more but single rows."""
        if not self.is_regular:
            return
        if not self.existed:
            self._opened = self._open("xb")
            _sync_folder(Path(self.path))
        self._file.truncate(keep_bytes)
        self.end = keep_bytes

    @property
    def _file(self) -> BinaryIO:
        if self._opened is None:
            raise ValueError(f"{self.path} was not begun")
        return self._opened

    def write(self, line: bytes) -> int:
        """Writes a line so that others can read it at once; returns `end`.

        Raises:
            FineServeError: the disk is full, or the system refuses for another reason.
        """
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            self._file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._refused(error) from None
        self.end += len(line)
        return self.end

    def sync(self) -> None:
        """What is written survives a loss of power. Raises `FineServeError` if the disk fails."""
        if self.is_regular:
            try:
                os.fsync(self._file.fileno())
            except OSError as error:
                raise self._refused(error) from None

    def _refused(self, error: OSError) -> FineServeError:
        if self.path == STDOUT:
            return FineServeError(
                f"cannot write to stdout: {error.strerror}; give an output file, which can be resumed"
            )
        if self.is_regular:
            self._file.truncate(self.end)
        return FineServeError(
            f"cannot write to {self.path}: {error.strerror}; what it holds so far is sound, "
            "so make room and run the same command with --resume"
        )

    def close(self) -> None:
        """Closes the file, and lets others write it."""
        if self._opened is not None and self.path != STDOUT:
            self._opened.close()
        self._unlock()

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _check_path(name: str, path: Path) -> None:
    if is_remote(name):
        raise ConfigError(
            f"the output {name} is an address; answers are added line by line, so name a file on this machine and copy "
            "it when the job has ended"
        )
    if os.path.isdir(path):  # unlike Path.is_dir, takes any name
        raise ConfigError(f"the output {path} is a directory; give a file in it, e.g. {path / 'answers.jsonl'}")
    if not os.path.isdir(path.parent):
        raise ConfigError(f"the output {path} cannot be written: there is no directory {path.parent}; create it")
    if path.suffix in OTHER_FORMATS:
        raise ConfigError(
            f"the output {path} would hold JSON lines, whatever its name says; call it "
            f"{path.with_suffix('.jsonl').name}, say, and convert it when the job has ended"
        )


def _sync_folder(path: Path) -> None:
    """The name of a new file survives a loss of power, too."""
    folder = os.open(path.absolute().parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system that cannot do that
            raise
    finally:
        os.close(folder)
