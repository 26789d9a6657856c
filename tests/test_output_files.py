"""What can be known of a file that is to be written later."""

import os

import pytest

from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.errors import ConfigError


@pytest.fixture
def closed(tmp_path, monkeypatch):
    """A folder that takes no new files, with one in it that may be written to; the superuser's rights set aside."""
    (tmp_path / "there.json").touch()
    monkeypatch.setattr(os, "access", lambda path, mode: os.fspath(path) != os.fspath(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "replaced", "fits"),
    [("there.json", False, True), ("there.json", True, False), ("new.json", False, False), ("new.json", True, False)],
)
def test_a_folder_need_not_be_writable_where_only_what_is_in_it_is_written_to(closed, name, replaced, fits):
    if fits:
        check_can_write("json", closed / name, replaced=replaced)
        return
    with pytest.raises(ConfigError, match=r"json='.*' cannot be written; name a file in a folder that can be"):
        check_can_write("json", closed / name, replaced=replaced)


def test_folders_and_files_in_none_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot be written: there is no folder .*nowhere; create it"):
        check_can_write("json", tmp_path / "nowhere" / "figures.json")
    with pytest.raises(ConfigError, match="cannot be written; name a file"):
        check_can_write("json", tmp_path)
    check_can_write("json", tmp_path / "figures.json")
    check_can_write("json", None)
