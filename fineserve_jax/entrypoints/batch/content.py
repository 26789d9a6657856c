"""What an input is, told from how it begins: JSON lines, CSV, Parquet, one of these compressed, or something else."""

import csv
import json
from dataclasses import dataclass
from typing import Literal

SNIFFED = 1 << 16  # bytes
COMPRESSIONS = ((b"\x1f\x8b", "gzip"), (b"\x28\xb5\x2f\xfd", "zstd"), (b"BZh", "bzip2"), (b"\xfd7zXZ\x00", "xz"))
PARQUET = b"PAR1"
MAGIC = (
    (
        b"\x04\x22\x4d\x18",
        "is compressed with lz4",
        "unpack it, or pipe it in: lz4 -dc FILE | fineserve-jax batch -i - ...",
    ),
    (b"PK\x03\x04", "is a ZIP archive (.zip, .xlsx, .npz)", "unpack it, and give a file of JSON lines"),
    (
        b"ARROW1",
        "is an Arrow file",
        'convert it, e.g. by pandas.read_feather(FILE).to_json(OUT, orient="records", lines=True)',
    ),
    (b"SQLite format 3\x00", "is an SQLite database", "export its rows as JSON lines"),
    (b"%PDF-", "is a PDF document", "write its text as JSON lines"),
    (b"GGUF", "is a GGUF model", "give it as --model, and a file of JSON lines as the input"),
)
ARRAY = "convert it: jq -c '.[]' FILE > OUT"
OBJECT = "write each object on a single line: jq -c . FILE > OUT"
ENCODINGS = (
    (b"\xff\xfe\x00\x00", "UTF-32LE"),
    (b"\x00\x00\xfe\xff", "UTF-32BE"),
    (b"\xff\xfe", "UTF-16LE"),
    (b"\xfe\xff", "UTF-16BE"),
)
MARK = b"\xef\xbb\xbf"
EXAMPLE = '{"prompt": "Hello"}'
DELIMITERS = (",", "\t", ";", "|")
COLUMNS = ("prompt", "messages", "body")
"""A table has one of these; that is how a line of CSV is known to be a header."""


@dataclass(frozen=True, slots=True)
class Content:
    """What an input holds.

    Attributes:
        kind: how its rows are written.
        delimiter: between the cells of CSV.
        openai: whether its rows are requests of OpenAI's batch API.
    """

    kind: Literal["lines", "csv", "parquet"] = "lines"
    delimiter: str = ","
    openai: bool = False


def compression(head: bytes) -> str | None:
    """By what an input that begins so is compressed."""
    return next((name for magic, name in COMPRESSIONS if head.startswith(magic)), None)


def content_of(head: bytes) -> Content:
    """What an input holds in which nothing is wrong, see `what_is_wrong`."""
    if head.startswith(PARQUET):
        return Content("parquet")
    delimiter = csv_delimiter(head)
    return Content("lines" if delimiter is None else "csv", delimiter or ",", b"custom_id" in head)


def csv_delimiter(head: bytes) -> str | None:
    """What stands between the cells of CSV whose header names a column for prompts; None if it is no such."""
    lines = [line for line in head.removeprefix(MARK).split(b"\n") if line.strip()]
    if not lines or lines[0].lstrip().startswith((b"{", b"[")) or b"\x00" in lines[0]:
        return None
    header = lines[0].decode(errors="replace")
    for delimiter in DELIMITERS:
        try:
            names = next(csv.reader([header.strip()], delimiter=delimiter), [])
        except csv.Error:
            return None
        if any(name.strip() in COLUMNS for name in names):
            return delimiter
    return None


def what_is_wrong(head: bytes, whole: bool) -> str | None:
    """What the input is instead of rows, and what to do; None if it may well hold some.

    Single lines that are no rows are for the job to report: only what is wrong as a whole is said here.

    Args:
        head: how the input begins, unpacked, up to `SNIFFED` bytes.
        whole: whether more lines can be told from `head` than the first: it was not cut short by a slow writer.
    """
    if head.startswith(PARQUET):
        return None
    if (packed := compression(head)) is not None:
        return f"is compressed with {packed} more than once; unpack it"
    for magic, is_what, remedy in MAGIC:
        if head.startswith(magic):
            return f"{is_what}, not JSON lines; {remedy}"
    if (encoding := _encoding(head)) is not None:
        return f"is text in {encoding[:6]}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 FILE > OUT"
    lines = [line.strip() for line in head.removeprefix(MARK).split(b"\n")]
    lines = [line for line in lines if line]
    if b"\x00" in head and not any(line.startswith(b"{") for line in lines):
        return f"is binary, not JSON lines; give a file with an object such as {EXAMPLE} on each line"
    return None if csv_delimiter(head) is not None else _wrong_text(lines, whole)


def _encoding(head: bytes) -> str | None:
    """The encoding, if it is UTF-16 or UTF-32, by its byte order mark or by its zeros."""
    for mark, encoding in ENCODINGS:
        if head.startswith(mark):
            return encoding
    start = head[:64]
    if len(start) >= 4 and any(start):
        for encoding, zeros in (("UTF-32LE", start[1::4] + start[2::4] + start[3::4]), ("UTF-16LE", start[1::2])):
            if not any(zeros):
                return encoding
        for encoding, zeros in (("UTF-32BE", start[::4] + start[1::4] + start[2::4]), ("UTF-16BE", start[::2])):
            if not any(zeros):
                return encoding
    return None


def _wrong_text(lines: list[bytes], whole: bool) -> str | None:
    """What is wrong with text of these lines, stripped and not empty."""
    if not lines:
        return None
    first, others = lines[0], lines[1:]
    rows_follow = any(line.startswith(b"{") for line in others)
    if b"\r" in first and not _is_json(first) and _is_json(first.split(b"\r")[0]):
        return "has lines that end in CR alone; convert it: tr '\\r' '\\n' < FILE > OUT"
    if first.startswith(b"[") and (first == b"[" or not (rows_follow and _is_json(first))):
        return f"is a JSON array, not JSON lines; {ARRAY}"
    if first.startswith(b"{"):
        spread = not _is_json(first) and others and not others[0].startswith(b"{") and _continues(lines)
        return f"is a JSON object over several lines, not JSON lines; {OBJECT}" if spread else None
    if whole and not rows_follow:
        shown = first[:60].decode(errors="replace")
        return (
            f"is no JSON lines: line 1 is {shown!r}; write an object such as {EXAMPLE} on each line, or CSV with a "
            "header that names a column prompt"
        )
    return None


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _continues(lines: list[bytes]) -> bool:
    """Whether the first line is the beginning of an object that goes on in the second one."""
    text = b"\n".join(lines).decode(errors="replace")
    try:
        json.JSONDecoder().raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos > len(lines[0].decode(errors="replace")) + 1
    except (ValueError, RecursionError):
        return False
    return True
