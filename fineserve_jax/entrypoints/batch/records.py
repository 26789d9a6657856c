"""Records: the rows of an input as they are read, before anything is known of what they ask."""

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from fineserve_jax.entrypoints.batch.byte_streams import CANNOT_READ
from fineserve_jax.entrypoints.batch.content import MARK

MAX_LINE_BYTES = 1 << 26
SEQ_BITS = 40  # of a line's number within its file
BATCH_ROWS = 256
TEXT_COLUMNS = {
    *("id", "custom_id", "prompt", "method", "url"),
    *("model", "kv_precision", "min_kv_precision", "tenant", "chat_template"),
}
"""Cells of CSV that are text whatever they look like; others are JSON where they can be, such as 0.7 or ["a", "b"]."""


@dataclass(frozen=True, slots=True)
class Record:
    """A row as it stands in an input.

    Attributes:
        line: its number, from 1 on; of a table, among its rows.
        content: a line of JSON; or the fields of a table's row; or, as text, why it cannot be read.
        file: which of the inputs, from 0 on.
    """

    line: int
    content: bytes | Mapping[str, Any] | str
    file: int = 0

    @property
    def seq(self) -> int:
        """Its place among the rows of all inputs, as one number."""
        return place(self.file, self.line)


def place(file: int, line: int) -> int:
    return (file << SEQ_BITS) | line


def line_records(lines: Iterable[bytes | str], file: int = 0) -> Iterator[Record]:
    """A record for each line that is not empty; empty lines count. A `str` is why its line cannot be read."""
    for number, line in enumerate(lines, start=1):
        if number == 1 and isinstance(line, bytes):
            line = line.removeprefix(MARK)
        if line.strip():
            yield Record(number, line, file)


def bounded_lines(stream: BinaryIO, limit: int = MAX_LINE_BYTES) -> Iterator[bytes | str]:
    """Lines as they are wanted; one of more than `limit` bytes is passed over without being held in memory.

    Where the stream cannot be read further, the last element says why.
    """
    number = 0
    try:
        while line := stream.readline(limit + 1):
            number += 1
            if len(line) <= limit:
                yield line
                continue
            while not line.endswith(b"\n") and (line := stream.readline(limit)):
                pass
            yield f"line {number} has more than {limit >> 20} MiB, which no prompt needs; shorten it"
    except CANNOT_READ as error:
        yield f"the input cannot be read from line {number + 1} on: {reason(error)}; mend it, and run it anew"


def reason(error: BaseException) -> str:
    """What a system or a library says of an error, in words."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def csv_records(stream: BinaryIO, delimiter: str, file: int = 0) -> Iterator[Record]:
    """Rows of CSV with a header, numbered without it. Empty cells are null."""
    csv.field_size_limit(MAX_LINE_BYTES)
    lines = _CsvLines(stream)
    reader = csv.reader(lines, delimiter=delimiter)
    header: list[str] | None = None
    number = 0
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            number += 1
            yield Record(number, lines.take_fault() or f"row {number} is no CSV: {error}", file)
            continue
        if header is None:
            header = [name.strip() for name in cells] if any(cells) else None
        elif cells:
            number += 1
            yield Record(number, _of_cells(number, header, cells), file)


class _CsvLines:
    """Lines as text for `csv.reader`, which it can go on with after one that cannot be read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines, self._first, self._fault = bounded_lines(stream), True, ""

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self._lines)
        if isinstance(line, str):
            self._fault = line
            raise csv.Error
        if self._first:
            line, self._first = line.removeprefix(MARK), False
        return line.decode(errors="surrogateescape")

    def take_fault(self) -> str:
        fault, self._fault = self._fault, ""
        return fault


def _of_cells(number: int, header: list[str], cells: list[str]) -> Mapping[str, Any] | str:
    if len(cells) != len(header):
        return f"row {number} has {len(cells)} cells, the header {len(header)}; quote cells that hold delimiters"
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return f"row {number} is not UTF-8; convert the file, e.g. by iconv -f LATIN1 -t UTF-8"
    return {name: _cell(name, cell) for name, cell in zip(header, cells, strict=True) if cell}


def _cell(name: str, cell: str) -> Any:
    if name in TEXT_COLUMNS:
        return cell
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def parquet_records(stream: BinaryIO, file: int = 0) -> Iterator[Record]:
    """Rows of a Parquet file, a few at a time. What is null in them is left out."""
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=1 << 20)
        for batch in table.iter_batches(BATCH_ROWS, use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield Record(number, _without_nulls(row), file)
    except (pyarrow.ArrowException, *CANNOT_READ) as error:
        yield Record(number + 1, f"the input cannot be read from row {number + 1} on: {reason(error)}", file)


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nulls(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        is_map = value and all(isinstance(part, tuple) for part in value)
        return _without_nulls(dict(value)) if is_map else [_without_nulls(part) for part in value]
    return value
