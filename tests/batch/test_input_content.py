"""What is said of inputs that are no JSON lines, and that those which are, whatever their rows, are let through."""

import gzip
import io
import json
import os
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax import ConfigError
from fineserve_jax.entrypoints.batch import Inputs
from fineserve_jax.entrypoints.batch.content import SNIFFED, what_is_wrong

ROW = b'{"id": 1, "prompt": "a"}'
ROWS = [{"id": 1, "prompt": "a"}, {"id": 2, "messages": [{"role": "user", "content": "b"}]}]
TEXT = "\n".join(map(json.dumps, ROWS))

NOT_LINES = {
    "array": (json.dumps(ROWS).encode(), r"is a JSON array, not JSON lines; .*jq -c '\.\[\]'"),
    "pretty array": (json.dumps(ROWS, indent=1).encode(), "is a JSON array"),
    "array after empty lines": (b"\xef\xbb\xbf\n \n" + json.dumps(ROWS, indent=1).encode(), "is a JSON array"),
    "array with a row on each line": (b"[" + ROW + b",\n" + ROW + b"]", "is a JSON array"),
    "long array": (json.dumps(ROWS * 9999).encode(), "is a JSON array"),
    "pretty object": (json.dumps(ROWS[0], indent=1).encode(), r"is a JSON object over several lines.*jq -c \."),
    "pretty objects": ("\n".join(json.dumps(row, indent=4) for row in ROWS).encode(), "is a JSON object over several"),
    "long object": (json.dumps({"rows": ROWS * 9999}, indent=1).encode(), "is a JSON object over several lines"),
    "object in two lines": (b'{"id": 1,\r\n"prompt": "a"}\r\n', "is a JSON object over several lines"),
    "UTF-16": (TEXT.encode("utf-16"), "is text in UTF-16, not UTF-8; convert it: iconv -f UTF-16LE -t UTF-8"),
    "UTF-16BE": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is text in .*iconv -f UTF-16BE"),
    "UTF-16LE without a mark": (TEXT.encode("utf-16-le"), "is text in .*iconv -f UTF-16LE"),
    "UTF-16BE without a mark": (TEXT.encode("utf-16-be"), "is text in .*iconv -f UTF-16BE"),
    "UTF-32": (TEXT.encode("utf-32"), "is text in UTF-32, not UTF-8; convert it: iconv -f UTF-32LE"),
    "UTF-32BE without a mark": (TEXT.encode("utf-32-be"), "is text in .*iconv -f UTF-32BE"),
    "gzip twice": (gzip.compress(gzip.compress(ROW)), "is compressed with gzip more than once; unpack it"),
    "gzip of an array": (gzip.compress(json.dumps(ROWS).encode()), "is a JSON array"),
    "torn gzip": (gzip.compress(ROW)[:-9], "cannot be read: Compressed file ended before"),
    "torn zstd": (b"\x28\xb5\x2f\xfd\x04", "cannot be read: "),
    "lz4": (b"\x04\x22\x4d\x18", "is compressed with lz4, not JSON lines; unpack it, or pipe it in: lz4 -dc FILE"),
    "zip": (b"PK\x03\x04\x14", "is a ZIP archive"),
    "torn Parquet": (b"PAR1\x15\x04", "cannot be read as Parquet: "),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "is a GGUF model, not JSON lines; give it as --model"),
    "safetensors": (b"\x40\0\0\0\0\0\0\0" + b'{"__metadata__": {}}', "is binary"),
    "other CSV": (b"id,text\n1,a\n", "is no JSON lines: line 1 is 'id,text'; write an object such as .* column prompt"),
    "plain text": ("Wär's?\nNein".encode(), 'is no JSON lines: line 1 is "Wär\'s\\?"'),
    "strings": (b'"a"\n"b"\n', "is no JSON lines"),
    "CR": (ROW + b"\r" + ROW + b"\r", "has lines that end in CR alone; convert it: tr"),
}
LINES = {
    "rows": TEXT.encode(),
    "marked": b"\xef\xbb\xbf" + TEXT.encode(),
    "CRLF": TEXT.replace("\n", "\r\n").encode(),
    "torn first row": b'{"prompt": "abc"\n' + ROW,
    "torn first row, then no row": b'{"prompt": "abc"\ngarbage\n' + ROW,
    "torn only row": b'{"prompt": ',
    "a comment first": b"# prompts\n" + ROW,
    "a list first": b'["a"]\n' + ROW,
    "no UTF-8 in a row": b'{"prompt": "\xff"}\n' + ROW,
    "a row longer than what is looked at": b'{"prompt": "' + b"a" * 2 * SNIFFED + b'"}',
    "CR as white space": b'{"id": 1,\r"prompt": "a"}\n',
}


@pytest.mark.parametrize("name", NOT_LINES)
def test_what_is_no_json_lines_is_named_with_the_remedy(tmp_path, name):
    content, error = NOT_LINES[name]
    (tmp_path / "in").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"the input .*in {error}"):
        Inputs(tmp_path / "in")


@pytest.mark.parametrize("name", LINES)
def test_json_lines_are_taken_whatever_single_lines_hold(tmp_path, name):
    (tmp_path / "in").write_bytes(LINES[name])
    inputs = Inputs(tmp_path / "in")
    assert not inputs.is_empty
    assert b"".join(record.content for record in inputs) == LINES[name].removeprefix(b"\xef\xbb\xbf")


@pytest.mark.parametrize("content", [b"", b"\n\r\n  \n"])
def test_an_input_without_rows_is_known_as_such(tmp_path, content):
    (tmp_path / "in").write_bytes(content)
    inputs = Inputs(tmp_path / "in")
    assert inputs.is_empty
    assert list(inputs) == []


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_are_judged(content, whole):
    assert what_is_wrong(content, whole) is None or content.strip()


def test_a_pipe_is_judged_by_what_comes_first_and_loses_nothing(tmp_path, monkeypatch):
    def piped(*parts):
        reader, writer = os.pipe()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(open(reader, "rb")))  # noqa: SIM115, closed below

        def write():
            with open(writer, "wb", buffering=0) as pipe:
                for part in parts:
                    pipe.write(part)

        thread = threading.Thread(target=write)
        thread.start()
        return thread

    thread = piped(b"no row\n", ROW + b"\n", b'{"prompt": "' + b"b" * 99_999 + b'"}')
    found = [record.content for record in Inputs("-")]
    assert found == [b"no row\n", ROW + b"\n", b'{"prompt": "' + b"b" * 99_999 + b'"}']
    thread.join()
    sys.stdin.close()
    thread = piped(gzip.compress(ROW))
    assert [record.content for record in Inputs("-")] == [ROW]
    thread.join()
    sys.stdin.close()


def test_stdin_that_is_closed_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigError, match=r"^stdin is closed; give a file"):
        Inputs("-")
