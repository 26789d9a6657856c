"""The output: refused before anything is lost, and sound at every moment."""

import io
import json
import os
import sys
from pathlib import Path

import pytest

from fineserve_jax import ConfigError, FineServeError
from fineserve_jax.entrypoints.batch import Inputs
from fineserve_jax.entrypoints.batch.answer_rows import as_line
from fineserve_jax.entrypoints.batch.answers import AnswerFile

FIRST, SECOND = {"id": 1, "text": "ä"}, {"id": "b", "text": "\n"}
ERROR = {"id": 3, "line": 3, "error": "bad"}


def lines(*rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "answers.jsonl"


def test_every_row_can_be_read_as_soon_as_it_is_written(path):
    with AnswerFile(path) as answers:
        answers.begin()
        for count, row in enumerate((FIRST, SECOND, ERROR), start=1):
            answers.write(as_line(row))
            assert [json.loads(line) for line in path.read_text().splitlines()] == [FIRST, SECOND, ERROR][:count]


def test_an_output_is_created_when_it_begins(path):
    AnswerFile(path).close()
    assert not path.exists()
    with AnswerFile(path) as answers:
        answers.begin()
    assert path.read_bytes() == b""


@pytest.mark.parametrize("content", [b"", lines(FIRST)])
def test_an_existing_output_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"answers.jsonl exists; go on with it by --resume, replace it by --over"):
        AnswerFile(path)
    assert path.read_bytes() == content


def test_overwriting_drops_nothing_before_it_begins(path):
    path.write_bytes(lines(FIRST))
    with AnswerFile(path, overwrite=True) as answers:
        assert path.read_bytes() == lines(FIRST)
        answers.begin()
        answers.write(as_line(SECOND))
    assert path.read_bytes() == as_line(SECOND)


def test_a_text_may_speak_of_what_json_lacks():
    row = {"id": "\ud800", "text": "NaN, Infinity and ä", "big": 10**40, "small": 1e-320}
    assert json.loads(as_line(row)) == row


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("", r"is a directory; give a file in it"),
        ("missing/answers.jsonl", r"there is no directory .*missing; create it"),
        ("file/answers.jsonl", r"there is no directory .*file; create it"),
        ("x" * 300, r"cannot be written: File name too long; name another"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused(tmp_path, name, error):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=error):
        AnswerFile(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_an_output_without_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="Permission denied"):
        AnswerFile(tmp_path / "answers.jsonl")


def test_contradictory_wishes_are_refused(path):
    with pytest.raises(ConfigError, match="give one of them"):
        AnswerFile(path, resume=True, overwrite=True)
    with pytest.raises(ConfigError, match="stdout cannot be resumed"):
        AnswerFile("-", resume=True)
    with pytest.raises(ConfigError, match="no regular file"):
        AnswerFile("/dev/null", resume=True)


def test_an_id_that_is_no_unicode_is_written_as_it_was_given(path):
    with AnswerFile(path) as answers:
        answers.begin()
        answers.write(as_line({"id": "\ud800", "text": "ä"}))
    assert json.loads(path.read_bytes()) == {"id": "\ud800", "text": "ä"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_reported_with_the_remedy():
    with AnswerFile("/dev/full") as answers:
        answers.begin()
        with pytest.raises(FineServeError, match=r"cannot write to /dev/full: No space left on device;.*--resume"):
            answers.write(as_line(FIRST))


def test_a_dash_is_stdout(monkeypatch):
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    with AnswerFile("-") as answers:
        answers.begin()
        answers.write(as_line(FIRST))
    assert json.loads(stdout.buffer.getvalue()) == FIRST


# -- the input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "error"), [("", "is a directory"), ("none", "No such file or directory")])
def test_an_input_that_cannot_be_read_is_refused(tmp_path, name, error):
    with pytest.raises(ConfigError, match=error):
        Inputs(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\n", b"{}", b"{}\n", b"{}\n\n{", b"{}\nb\n"])
def test_rows_are_counted_beforehand_empty_lines_included(tmp_path, content):
    (tmp_path / "in").write_bytes(content)
    assert Inputs(tmp_path / "in").survey().num_rows == len(content.splitlines())


def test_an_input_knows_itself_by_any_name(tmp_path):
    (tmp_path / "in").touch()
    (tmp_path / "link").symlink_to("in")
    (tmp_path / "other").touch()
    inputs = Inputs([tmp_path / "other", tmp_path / "in"])
    same = [inputs.is_same_file(tmp_path / name) for name in ("in", "link", "other", "none")]
    assert same == [True, True, True, False]
