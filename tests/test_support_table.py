"""The page that says what is tested says what the tests test."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_is_as_the_tests_declare():
    spec = importlib.util.spec_from_file_location("support_table", ROOT / "docs" / "support_table.py")
    support_table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(support_table)
    assert support_table.PAGE.read_text(encoding="utf-8") == support_table.page(), "run `python docs/support_table.py`"
    assert support_table.UNTESTED not in support_table.page().split("fixtures tested as such")[0]
