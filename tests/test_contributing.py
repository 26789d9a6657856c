"""The developers' guide names what there is."""

import importlib.util
import re
from pathlib import Path

import pytest

import fineserve_jax

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_map_names_every_module_as_its_docstring_does():
    spec = importlib.util.spec_from_file_location("module_map", ROOT / "docs" / "module_map.py")
    module_map = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module_map)
    assert module_map.with_map(GUIDE) == GUIDE, "run `python docs/module_map.py`"


def test_every_path_that_the_guide_names_exists():
    text = GUIDE.split("## The modules")[0]
    quoted = [code or link for code, link in re.findall(r"`([^`\n]+)`|\]\(([^)\n]+)\)", text)]
    paths = {word for part in quoted for word in part.split() if "/" in word and not word.startswith(".venv/")}
    patterns = [path.rstrip("/") for path in paths]
    assert not [path for path in patterns if not [*ROOT.glob(path), *(ROOT / "fineserve_jax").glob(path)]]


@pytest.mark.parametrize("page", sorted((ROOT / "docs" / "api").glob("*.md")), ids=lambda page: page.name)
def test_the_api_pages_name_what_is_public(page):
    for name in re.findall(r"^::: fineserve_jax\.(\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        assert name in fineserve_jax.__all__ or name == "pallas_kernels"


def test_all_that_is_public_has_an_api_page():
    text = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "api").glob("*.md"))
    assert set(fineserve_jax.__all__) - {"__version__"} <= set(
        re.findall(r"^::: fineserve_jax\.(\S+)$", text, re.MULTILINE)
    )
