"""The inputs of a job: refused before any work if they cannot be read, then read record by record."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from fineserve_jax.entrypoints.batch.byte_streams import (
    CANNOT_READ,
    GIVE,
    STDIN,
    expand,
    first_bytes,
    is_remote,
    open_bytes,
    remote_version,
    unpacked,
)
from fineserve_jax.entrypoints.batch.content import SNIFFED, Content, compression, content_of, what_is_wrong
from fineserve_jax.entrypoints.batch.records import (
    Record,
    bounded_lines,
    csv_records,
    line_records,
    parquet_records,
    reason,
)
from fineserve_jax.errors import ConfigError

BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class InputFile:
    """One input, known to hold rows as far as its beginning tells.

    Attributes:
        path: as it was given, or found by a pattern.
        content: what it holds.
        is_empty: known to hold nothing.
        is_packed: whether it is compressed.
        stream: of stdin or a pipe, which can be read once; None of what can be opened again.
    """

    path: str
    content: Content
    is_empty: bool
    is_packed: bool
    stream: BinaryIO | None = None

    def records(self, index: int = 0) -> Iterator[Record]:
        """Its rows, from the first on. `index`: which of the inputs it is."""
        with contextlib.ExitStack() as stack:
            stream = self.stream or open_bytes(self.path)
            if self.path != STDIN:
                stack.callback(stream.close)
            if self.content.kind == "parquet":
                yield from parquet_records(stream, index)
            elif self.content.kind == "csv":
                yield from csv_records(unpacked(stream), self.content.delimiter, index)
            else:
                yield from line_records(bounded_lines(unpacked(stream)), index)

    def survey(self) -> tuple[int | None, dict[str, Any]]:
        """How many rows it has, None where that cannot be known beforehand, and what it is known again by.

        Reads the whole file, which takes a second or two per gigabyte.
        """
        if self.stream is not None:
            return None, {}
        if is_remote(self.path):
            return None, {"version": remote_version(self.path)}
        with open_bytes(self.path) as stream:
            size, digest, lines = _digest(stream)
            if self.content.kind == "parquet":
                lines = _parquet_rows(stream)
        known = self.content.kind != "csv" and not self.is_packed
        return (lines if known else self._count()), {"bytes": size, "sha256": digest}

    def begins_with(self, size: int, digest: str) -> bool:
        """Whether its first `size` bytes have that SHA-256, and end with a line."""
        if self.stream or is_remote(self.path) or self.is_packed or self.content.kind == "parquet":
            return False
        with open_bytes(self.path) as stream:
            if size == 0:
                return True
            found, begin, _ = _digest(stream, size)
            stream.seek(size - 1)
            return (found, begin) == (size, digest) and stream.read(1) == b"\n"

    def _count(self) -> int:
        return sum(1 for _ in self.records())


class Inputs:
    """The rows of one file or of several, one after another; of stdin for "-".

    Args:
        paths: files, patterns such as day-*.jsonl, or addresses that fsspec knows.

    Raises:
        ConfigError: a path that is missing, is no file, cannot be read, or begins as nothing does that holds rows.

    Attributes:
        files: what the paths name, in order.
    """

    def __init__(self, paths: str | Path | Sequence[str | Path]) -> None:
        given = [paths] if isinstance(paths, str | Path) else list(paths)
        if not given:
            raise ConfigError(f"there is no input; {GIVE}")
        found = [name for path in given for name in expand(str(path))]
        if STDIN in found and len(found) > 1:
            raise ConfigError("stdin can only be an input by itself; write it to a file, or leave the others out")
        self.files = [_examined(path) for path in found]
        self.num_rows: int | None = None
        self.fingerprints: list[dict[str, Any]] = []

    @property
    def names(self) -> list[str]:
        return [file.path for file in self.files]

    @property
    def can_be_read_again(self) -> bool:
        """Whether none of them is stdin or a pipe."""
        return all(file.stream is None for file in self.files)

    @property
    def openai(self) -> bool:
        """Whether the first of them holds requests of OpenAI's batch API."""
        return self.files[0].content.openai

    @property
    def is_empty(self) -> bool:
        return all(file.is_empty for file in self.files)

    def survey(self) -> Self:
        """Sets `num_rows`, None if unknown, and `fingerprints`, one a file. Reads all of them once."""
        counts = []
        for file in self.files:
            count, fingerprint = file.survey()
            counts.append(count)
            self.fingerprints.append(fingerprint)
        self.num_rows = None if None in counts else sum(count for count in counts if count is not None)
        return self

    def is_same_file(self, path: str | Path) -> bool:
        """Whether `path` names one of the files that are read here."""
        local = [name for name in self.names if name != STDIN and not is_remote(name)]
        return os.path.exists(path) and any(os.path.samefile(name, path) for name in local)

    def __iter__(self) -> Iterator[Record]:
        for index, file in enumerate(self.files):
            yield from file.records(index)


def _examined(path: str) -> InputFile:
    """Looks at how an input begins. Raises `ConfigError` if that is the beginning of something else."""
    stream = open_bytes(path)
    once = path == STDIN or not stream.seekable()
    with contextlib.ExitStack() as stack:
        if path != STDIN:
            stack.callback(stream.close)
        file = _judged(path, stream, once)
        if once:
            stack.pop_all()
    return file


def _judged(path: str, stream: BinaryIO, once: bool) -> InputFile:
    """What an input is. `once`: whether it can be read a single time."""
    name = "stdin" if path == STDIN else f"the input {path}"
    try:
        head, seekable = first_bytes(stream), stream.seekable()
        is_packed = compression(head) is not None
        # Unpacking what can be read once would take from it: what it holds is told line by line.
        begin = head if not is_packed else b"" if once else unpacked(stream).read(SNIFFED)
    except CANNOT_READ as error:
        raise ConfigError(f"{name} cannot be read: {reason(error)}; {GIVE}") from None
    if (wrong := what_is_wrong(begin, whole=seekable)) is not None:
        raise ConfigError(f"{name} {wrong}")
    content = content_of(begin)
    if content.kind == "parquet":
        _check_parquet(name, path, is_packed, once)
    is_empty = seekable and not is_packed and not begin.strip() and len(begin) < SNIFFED
    return InputFile(path, content, is_empty, is_packed, stream if once else None)


def _check_parquet(name: str, path: str, is_packed: bool, once: bool) -> None:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(
            f"{name} is a Parquet file, for which pyarrow is needed: pip install 'fineserve-jax[files]'"
        ) from None
    if is_packed:
        raise ConfigError(f"{name} is a Parquet file that is compressed once more; unpack it")
    if once:
        raise ConfigError(f"{name} is a Parquet file, which is read from its end; give its path")
    with open_bytes(path) as stream:
        try:
            names = pyarrow.parquet.ParquetFile(stream).schema_arrow.names
        except (pyarrow.ArrowException, OSError) as error:
            raise ConfigError(f"{name} cannot be read as Parquet: {error}") from None
    if not {"prompt", "messages", "body"} & set(names):
        raise ConfigError(f"{name} has no column prompt, messages or body; it has: {', '.join(names)}")


def _parquet_rows(stream: BinaryIO) -> int:
    import pyarrow.parquet

    stream.seek(0)
    return int(pyarrow.parquet.ParquetFile(stream).metadata.num_rows)


def _digest(stream: BinaryIO, size: int | None = None) -> tuple[int, str, int]:
    """Bytes, their SHA-256, and lines, of all that follows or of the next `size` bytes."""
    digest, read, lines, last = hashlib.sha256(), 0, 0, b"\n"
    while block := stream.read(BLOCK if size is None else min(BLOCK, size - read)):
        digest.update(block)
        read, lines, last = read + len(block), lines + block.count(b"\n"), block[-1:]
    return read, digest.hexdigest(), lines + (last != b"\n")
