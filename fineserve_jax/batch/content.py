"""What a file of prompts is, told from how it begins: JSON lines, or something else."""

import json

SNIFFED = 1 << 16  # bytes
TO_LINES = 'convert it, e.g. by pandas.{reader}(FILE).to_json(OUT, orient="records", lines=True)'
UNPACK = "unpack it, or pipe it in: {command} FILE | fineserve-jax batch -i - ..."
MAGIC = (
    (b"\x1f\x8b", "is compressed with gzip", UNPACK.format(command="gzip -dc")),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd", UNPACK.format(command="zstd -dc")),
    (b"BZh", "is compressed with bzip2", UNPACK.format(command="bzip2 -dc")),
    (b"\xfd7zXZ\x00", "is compressed with xz", UNPACK.format(command="xz -dc")),
    (b"\x04\x22\x4d\x18", "is compressed with lz4", UNPACK.format(command="lz4 -dc")),
    (b"PK\x03\x04", "is a ZIP archive (.zip, .xlsx, .npz)", "unpack it, and give a file of JSON lines"),
    (
        b"PAR1",
        "is a Parquet file",
        TO_LINES.format(reader="read_parquet"),
    ),
    (
        b"ARROW1",
        "is an Arrow file",
        TO_LINES.format(reader="read_feather"),
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
EXAMPLE = '{"prompt": "Hello"}'


def what_is_wrong(head: bytes, whole: bool) -> str | None:
    """What the input is instead of JSON lines, and what to do; None if it may well be some.

    Single lines that are no rows are for the job to report: only what is wrong as a whole is said here.

    Args:
        head: how the input begins, up to `SNIFFED` bytes.
        whole: whether more lines can be told from `head` than the first: it was not cut short by a slow writer.
    """
    for magic, is_what, remedy in MAGIC:
        if head.startswith(magic):
            return f"{is_what}, not JSON lines; {remedy}"
    if (encoding := _encoding(head)) is not None:
        return f"is text in {encoding[:6]}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 FILE > OUT"
    if b"\x00" in head:
        return f"is binary, not JSON lines; give a file with an object such as {EXAMPLE} on each line"
    lines = [line.strip() for line in head.removeprefix(b"\xef\xbb\xbf").split(b"\n")]
    return _wrong_text([line for line in lines if line], whole)


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
        return f"is no JSON lines: line 1 is {shown!r}; write an object such as {EXAMPLE} on each line"
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
