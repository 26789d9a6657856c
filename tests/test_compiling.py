"""The list of tests that compile is of files there are."""

from compiling import COMPILING, TESTS, is_listed


def test_what_is_listed_exists():
    assert [name for name in COMPILING if not (TESTS / name).exists()] == []


def test_folders_are_listed_with_all_that_is_in_them():
    assert is_listed(TESTS / "engine")
    assert is_listed(TESTS / "engine" / "test_engine.py")
    assert not is_listed(TESTS / "batch")
    assert not is_listed(TESTS / "kv" / "test_kv_slabs.py")
