"""The benchmarks that need no device run, on a case small enough to test."""

import json
import sys

import pytest

from benchmarks import paper, scheduler_cost


def last_line(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_curves_are_written_as_figures_plot_and_page_and_kept_from_run_to_run(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(paper, "SHARED", tmp_path / "none.csv")
    for only in ("one-precision", "pressure-most"):
        words = ["paper.py", "--seconds", "0.5", "--only", only, "--output", str(tmp_path / "curves")]
        monkeypatch.setattr(sys, "argv", words)
        paper.main()
    assert set(last_line(capsys)["gains"]) == {"one-precision", "pressure-most"}
    page = (tmp_path / "curves.md").read_text()
    assert "![All int4, 100 requests/s](curves/pressure-most.svg)" in page
    assert (tmp_path / "curves" / "one-precision.svg").exists()


def test_every_point_of_every_curve_names_what_there_is():
    for curve in paper.curves():
        for point in curve.points:
            experiment = paper.experiment_of(point, None, seconds=0.2, seed=0)
            assert experiment.cluster.arena_bytes > 0


@pytest.mark.parametrize("policy", ["fineserve", "tenants"])
def test_the_cost_of_decisions_is_measured(policy, capsys, monkeypatch):
    words = ["scheduler_cost.py", "--running", "8", "--waiting", "20", "40", "--steps", "30", "--policy", policy]
    monkeypatch.setattr(sys, "argv", words)
    scheduler_cost.main()
    results = last_line(capsys)["results"]
    assert {size: result["running"] > 4 for size, result in results.items()} == {"20": True, "40": True}
