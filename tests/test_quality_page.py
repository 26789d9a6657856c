"""What is said about quality is what was measured."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "quality.md")]


@pytest.fixture(scope="module")
def quality_page():
    spec = importlib.util.spec_from_file_location("quality_page", ROOT / "docs" / "quality_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def figures(name):
    return json.loads((ROOT / "docs" / "quality" / f"{name}.json").read_text())


def test_the_page_and_the_readme_are_as_the_figures_are(quality_page):
    for path, text in ((quality_page.PAGE, quality_page.page()), (quality_page.README, quality_page.readme())):
        assert path.read_text(encoding="utf-8") == text, "run `python docs/quality_page.py`"


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_readme_tells_the_loss_of_formats(name):
    """Read from the run itself, not through what writes the page."""
    (found,) = (row for row in figures("formats")["formats"] if row["kv_precision"] == name)
    low, value, high = (f"{100 * found['rise'][part]:+.2f}" for part in ("low", "value", "high"))
    (line,) = (line for line in PAGES[0].read_text().split("\n") if line.startswith(f"| `{name}` |"))
    assert [cell.strip() for cell in line.split("|")][2:4] == [
        f"{found['bits_per_value']:.2f}",
        f"{value} % ({low} to {high})",
    ]


def test_what_the_page_advises_is_what_the_command_says(quality_page):
    """Of all limits: no format of fewer bits has its whole interval below it."""
    found = quality_page.measured(1024)
    section = quality_page.page().split("## Which to take")[1].split("##")[0]
    advice = re.findall(r"\| ([\d.]+) % \| `(\w+)` \|", section)
    assert len(advice) == len(quality_page.LIMITS)
    for limit, name in advice:
        fits = {own: 100 * row["rise"]["high"] <= float(limit) for own, (row, _) in found.items()}
        bits = {own: row["bits_per_value"] for own, (row, _) in found.items()}
        assert fits.get(name, name == "fp32")
        assert not any(fits[own] for own in found if bits[own] < bits.get(name, 32))


def test_every_run_says_how_to_repeat_it():
    runs = [json.loads(path.read_text()) for path in (ROOT / "docs" / "quality").glob("*.json")]
    assert runs
    for run in runs:
        assert re.match(r"(fineserve-jax quality|python benchmarks/\w+\.py) .*--text \w+\.txt", run["command"])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_no_other_page_has_figures_of_quality(path):
    paragraphs = re.split(r"\n\s*\n", path.read_text())
    claims = [p for p in paragraphs if re.search(r"perplexity|KL diverg|likeliest token", p)]
    assert [p for p in claims if re.search(r"\d ?%", p) and "interval" not in p and "per cent" not in p] == []
