"""Inputs of every kind give the same rows: JSON lines, CSV and Parquet, compressed or not, one or many, near or far."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import sys
import threading
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax import ConfigError
from fineserve_jax.entrypoints.batch import BadRow, Inputs, read_rows
from fineserve_jax.entrypoints.batch.records import MAX_LINE_BYTES, bounded_lines, csv_records

ROWS: list[dict[str, Any]] = [
    {"id": "a", "prompt": 'say "hi",\nthen go', "temperature": 0.5, "max_tokens": 3, "stop": ["x", "y"]},
    {"id": "b", "prompt": "7", "kv_precision": "int8", "logit_bias": {"5": -1.0}},
    {"id": "c", "messages": [{"role": "user", "content": "Grüße"}], "seed": 4, "ignore_eos": True},
]
COLUMNS = list(dict.fromkeys(name for row in ROWS for name in row))


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def as_lines(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def as_csv(rows, delimiter=","):
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, delimiter=delimiter)
    table.writeheader()
    for row in rows:
        table.writerow({name: value if isinstance(value, str) else json.dumps(value) for name, value in row.items()})
    return text.getvalue().encode()


def as_parquet(rows):
    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{**dict.fromkeys(COLUMNS), **row} for row in rows]), content)
    return content.getvalue()


def found(*paths):
    inputs = Inputs(list(paths))
    return list(read_rows(inputs, inputs.names))


def told(rows):
    """What rows ask for, whatever they were read from."""
    return [(row.id, row.prompt, row.messages, row.options, dict(row.sampling)) for row in rows]


@pytest.fixture
def plain(tmp_path):
    (tmp_path / "plain").write_bytes(as_lines(ROWS))
    rows = found(tmp_path / "plain")
    assert not any(isinstance(row, BadRow) for row in rows)
    return told(rows)


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstd, bz2.compress, lzma.compress], ids=lambda f: f.__name__)
@pytest.mark.parametrize("write", [as_lines, as_csv])
def test_the_rows_are_the_same_in_every_form(tmp_path, plain, write, pack):
    (tmp_path / "in").write_bytes(pack(write(ROWS)))
    assert told(found(tmp_path / "in")) == plain
    assert Inputs(tmp_path / "in").survey().num_rows == 3


def test_a_parquet_file_has_the_same_rows(tmp_path, plain):
    (tmp_path / "in").write_bytes(as_parquet(ROWS))
    assert told(found(tmp_path / "in")) == plain
    assert [row.line for row in found(tmp_path / "in")] == [1, 2, 3]
    assert Inputs(tmp_path / "in").survey().num_rows == 3


@pytest.mark.parametrize("delimiter", ["\t", ";", "|"])
def test_csv_may_have_other_delimiters(tmp_path, plain, delimiter):
    (tmp_path / "in").write_bytes(b"\xef\xbb\xbf" + as_csv(ROWS, delimiter))
    assert told(found(tmp_path / "in")) == plain


@pytest.mark.parametrize("pack", [gzip.compress, zstd], ids=lambda f: f.__name__)
def test_pieces_that_were_compressed_one_by_one_are_read_to_the_end(tmp_path, plain, pack):
    (tmp_path / "in").write_bytes(b"".join(pack(as_lines([row])) for row in ROWS))
    assert told(found(tmp_path / "in")) == plain


def test_many_rows_of_parquet_come_in_their_order(tmp_path):
    (tmp_path / "in").write_bytes(as_parquet([{"id": str(i), "prompt": "x"} for i in range(1000)]))
    assert [row.id for row in found(tmp_path / "in")] == [str(i) for i in range(1000)]


def test_values_that_are_no_json_are_refused_for_their_rows(tmp_path):
    table = pyarrow.table({"id": pyarrow.array([0], pyarrow.timestamp("s")), "prompt": ["x"]})
    pyarrow.parquet.write_table(table, tmp_path / "in")
    (row,) = found(tmp_path / "in")
    assert "an id of type datetime is no JSON value; give it as text" in row.error


def test_a_parquet_file_without_prompts_is_refused_naming_its_columns(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"], "n": [1]}), tmp_path / "in")
    with pytest.raises(ConfigError, match="has no column prompt, messages or body; it has: text, n"):
        Inputs(tmp_path / "in")
    (tmp_path / "in.gz").write_bytes(gzip.compress((tmp_path / "in").read_bytes()))
    with pytest.raises(ConfigError, match="is a Parquet file that is compressed once more; unpack it"):
        Inputs(tmp_path / "in.gz")


def test_a_row_of_csv_that_cannot_be_read_is_its_own(tmp_path):
    (tmp_path / "in").write_bytes(b"id,prompt\na,x\nb\nc,y,z\nd,\xff\n\ne,z\n")
    rows = found(tmp_path / "in")
    assert [(row.line, row.id) for row in rows if not isinstance(row, BadRow)] == [(1, "a"), (5, "e")]
    errors = {row.line: row.error for row in rows if isinstance(row, BadRow)}
    assert errors == {
        2: "row 2 has 1 cells, the header 2; quote cells that hold delimiters",
        3: "row 3 has 3 cells, the header 2; quote cells that hold delimiters",
        4: "row 4 is not UTF-8; convert the file, e.g. by iconv -f LATIN1 -t UTF-8",
    }


@pytest.mark.parametrize("pack", [gzip.compress, zstd, bz2.compress, lzma.compress], ids=lambda f: f.__name__)
def test_what_breaks_off_gives_the_rows_before_and_an_error(tmp_path, pack):
    lines = [{"prompt": f"{i} " + os.urandom(200).hex()} for i in range(6000)]
    whole = pack(as_lines(lines))
    (tmp_path / "in").write_bytes(whole[: len(whole) * 4 // 5])
    *rows, last = found(tmp_path / "in")
    assert isinstance(last, BadRow)
    assert last.error.startswith(f"the input cannot be read from line {last.line} on: ")
    assert [row.prompt for row in rows] == [row["prompt"] for row in lines[: len(rows)]]
    assert len(rows) > 500


def test_several_inputs_and_patterns_are_read_in_order_and_name_their_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("day-2.jsonl", "day-1.jsonl", "last.jsonl"):
        Path(name).write_bytes(as_lines([{"prompt": name}, {"id": name, "prompt": "x"}]) + b"{\n")
    rows = found("day-*.jsonl", "last.jsonl")
    names = ["day-1.jsonl", "day-2.jsonl", "last.jsonl"]
    assert [row.id for row in rows] == [one for name in names for one in (f"{name}:1", name, f"{name}:3")]
    assert [(row.file, row.line) for row in rows] == [(file, line) for file in range(3) for line in (1, 2, 3)]
    assert len({row.seq for row in rows}) == 9
    assert sorted(rows, key=lambda row: row.seq) == rows


def test_a_name_with_the_letters_of_a_pattern_is_a_name(tmp_path):
    (tmp_path / "a[1].jsonl").write_bytes(as_lines(ROWS))
    assert len(found(tmp_path / "a[1].jsonl")) == 3
    with pytest.raises(ConfigError, match=r"none-\*.jsonl matches no file"):
        Inputs(tmp_path / "none-*.jsonl")
    with pytest.raises(ConfigError, match="is a directory; give a file in it, or a pattern such as"):
        Inputs(tmp_path)
    with pytest.raises(ConfigError, match="there is no input"):
        Inputs([])
    with pytest.raises(ConfigError, match="stdin can only be an input by itself"):
        Inputs(["-", tmp_path / "a[1].jsonl"])


def test_an_address_is_read_through_fsspec(plain):
    files = fsspec.filesystem("memory")
    files.pipe({"/bucket/a.jsonl.gz": gzip.compress(as_lines(ROWS)), "/bucket/b.csv": as_csv(ROWS)})
    files.pipe({"/bucket/c.parquet": as_parquet(ROWS)})
    for name in ("a.jsonl.gz", "b.csv", "c.parquet"):
        assert told(found(f"memory://bucket/{name}")) == plain
    assert [file.path for file in Inputs("memory://bucket/*.jsonl.gz").files] == ["memory:///bucket/a.jsonl.gz"]
    before = Inputs("memory://bucket/b.csv").survey().fingerprints
    assert before == Inputs("memory://bucket/b.csv").survey().fingerprints
    files.pipe({"/bucket/b.csv": as_csv(ROWS[:2])})
    assert before != Inputs("memory://bucket/b.csv").survey().fingerprints
    with pytest.raises(ConfigError, match=r"memory://bucket/none cannot be read: there is no such file"):
        Inputs("memory://bucket/none")
    with pytest.raises(ConfigError, match=r"nonsense://a cannot be reached: Protocol not known: nonsense"):
        Inputs("nonsense://a")


@pytest.mark.parametrize(
    ("module", "path", "extra"),
    [("fsspec", "memory://x", "remote"), ("pyarrow.parquet", "in.parquet", "files"), ("pyarrow", "in.zst", "files")],
)
def test_a_package_that_is_missing_is_named_with_its_extra(tmp_path, monkeypatch, module, path, extra):
    monkeypatch.chdir(tmp_path)
    Path("in.parquet").write_bytes(as_parquet(ROWS))
    Path("in.zst").write_bytes(zstd(as_lines(ROWS)))
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=rf"is needed: pip install 'fineserve-jax\[{extra}\]'"):
        Inputs(path)


def test_a_pipe_is_read_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    thread = threading.Thread(target=(tmp_path / "pipe").write_bytes, args=(as_lines(ROWS * 5000),))
    thread.start()
    inputs = Inputs(tmp_path / "pipe")
    assert not inputs.can_be_read_again
    assert inputs.survey().num_rows is None
    assert sum(1 for _ in inputs) == 15_000
    thread.join()


@pytest.mark.parametrize("length", [9, 10, 11, 25, 30])
def test_a_line_that_is_too_long_is_passed_over(length):
    content = b"a\n" + b"x" * (length - 1) + b"\nb\n"
    first, second, third = bounded_lines(io.BytesIO(content), limit=10)
    assert (first, third) == (b"a\n", b"b\n")
    assert second == content.split(b"\n")[1] + b"\n" if length <= 10 else second.startswith("line 2 has more than")
    assert MAX_LINE_BYTES > 50 << 20


@given(st.binary(max_size=300))
def test_any_bytes_are_csv_or_errors(content):
    for record in csv_records(io.BytesIO(b"id,prompt\n" + content), ","):
        assert record.line >= 1
        assert isinstance(record.content, str | dict)
