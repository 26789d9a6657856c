"""`fineserve-jax slabs`: a recorded run becomes a picture and a page that needs no network."""

import json
import re
import sys

import pytest

from fineserve_jax.kv.recording import read_record


@pytest.fixture
def record(run, tmp_path):
    rows = [{"prompt": "abc" * n, "kv_precision": name} for n, name in ((9, "int4"), (20, "bf16"), (14, "int8"))]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    files = ["-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--record", tmp_path / "run.jsonl"]
    status, _, err = run("batch", *files, "--record-every", 1, "--max-tokens", 8, "--ignore-eos", "MODEL")
    assert status == 0, err
    return tmp_path / "run.jsonl"


def test_a_recorded_batch_is_drawn(run, record):
    pytest.importorskip("matplotlib")
    header, entries = read_record(record)
    assert {name for entry in entries for name in entry.formats} == {"bf16", "int8", "int4"}
    assert max(entry.running for entry in entries) == 3
    status, out, _ = run("slabs", record)
    picture, page = record.with_suffix(".png"), record.with_suffix(".html")
    assert (status, out.split()) == (0, [str(picture), str(page)])
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(header.pools) >= 3


def test_the_page_stands_alone(run, record, tmp_path):
    status, out, _ = run("slabs", record, "--page-only", "-o", tmp_path / "seen")
    assert (status, out.split()) == (0, [str(tmp_path / "seen.html")])
    page = (tmp_path / "seen.html").read_text()
    assert not re.search(r"https?:|src=|@import|<link", page)
    data = json.loads(re.search(r"^const data = (.*);$", page, re.MULTILINE).group(1))
    entries = read_record(record)[1]
    assert data["steps"] == [entry.step for entry in entries]
    assert data["maps"] == [entry.slabs for entry in entries]
    assert len(data["needed"]) == len(data["reserved"]["int4"]) == len(entries)


def test_without_matplotlib_the_remedy_is_named(run, record, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    status, _, err = run("slabs", record)
    assert status == 2
    assert "pip install 'fineserve-jax[plot]', or give --page-only" in err


def test_what_is_no_record_is_refused(run, tmp_path):
    (tmp_path / "answers.jsonl").write_text('{"id": 1}\n')
    status, _, err = run("slabs", tmp_path / "answers.jsonl")
    assert status == 2
    assert "is no record of a run" in err
