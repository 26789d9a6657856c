"""One HTML page about several runs, side by side. It loads nothing, so that it opens offline."""

import html
from collections.abc import Callable, Sequence
from pathlib import Path

from fineserve_jax.sim.charts import Points, distribution, line_chart
from fineserve_jax.sim.experiment import Result
from fineserve_jax.sim.metrics import Summary
from fineserve_jax.sim.records import RequestRecord, Run, Sample

STYLE = """
body { font: 14px sans-serif; margin: 2em; color: #222 }
.wide { overflow-x: auto }
table { border-collapse: collapse } td, th { padding: 3px 10px; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left } svg { margin: 6px } h2 { margin-top: 1.6em }
"""
Column = tuple[str, Callable[[Summary], float | None], str]
COLUMNS: tuple[Column, ...] = (
    ("requests", lambda s: s.num_requests, ".0f"),
    ("answered", lambda s: s.num_done, ".0f"),
    ("dropped", lambda s: s.num_dropped + s.num_refused, ".0f"),
    ("tokens/s", lambda s: s.output_tokens_per_s, ".0f"),
    ("tokens/s in time", lambda s: s.goodput_tokens_per_s, ".0f"),
    ("in time", lambda s: s.attainment, ".1%"),
    ("TTFT p50, s", lambda s: s.ttft.p50, ".3f"),
    ("TTFT p99, s", lambda s: s.ttft.p99, ".3f"),
    ("TPOT p50, s", lambda s: s.tpot.p50, ".4f"),
    ("TPOT p99, s", lambda s: s.tpot.p99, ".4f"),
    ("longest wait, s", lambda s: s.longest_wait_s, ".1f"),
    ("preemptions", lambda s: s.num_preemptions, ".0f"),
    ("reserved/needed", lambda s: s.reserved_over_needed, ".3f"),
    ("memory in use", lambda s: s.occupancy, ".1%"),
    ("requests in memory", lambda s: s.mean_running, ".1f"),
)
CURVES: tuple[Column, ...] = (
    ("share of requests in time", lambda s: s.attainment, ""),
    ("tokens/s", lambda s: s.output_tokens_per_s, ""),
    ("tokens/s of requests in time", lambda s: s.goodput_tokens_per_s, ""),
)


def write_report(path: str | Path, results: Sequence[Result], title: str) -> None:
    """Write the page. Distributions and occupancy are those of the highest rate."""
    Path(path).write_text(report(results, title))


def report(results: Sequence[Result], title: str) -> str:
    """The page as text."""
    highest = max(result.rate_scale for result in results)
    last = [result for result in results if result.rate_scale == highest]
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
        "<h2>Against the rate</h2>",
        *(_curve(results, *column[:2]) for column in CURVES),
        f"<h2>At {last[0].rate:.2f} requests/s</h2>",
        _distribution("time to the first token", "seconds", last, lambda one: one.ttft_s),
        _distribution("time per further token", "seconds", last, lambda one: one.tpot_s),
        _over_time("KV memory needed", "share of the usable", last, lambda run, s: s.needed_bytes / run.usable_bytes),
        _over_time(
            "KV memory reserved", "share of the usable", last, lambda run, s: s.reserved_bytes / run.usable_bytes
        ),
        _over_time("requests in memory", "requests", last, lambda run, s: s.num_running),
        _over_time("requests waiting", "requests", last, lambda run, s: s.num_waiting),
        "<h2>Figures</h2>",
        _table(results),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _curve(results: Sequence[Result], label: str, value: Callable[[Summary], float | None]) -> str:
    """A chart of one figure against the rate, a line for each system."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        lines.setdefault(result.system, []).append((result.rate, value(result.summary) or 0.0))
    return line_chart(label, "requests/s", label, {name: sorted(line) for name, line in lines.items()})


def _distribution(
    title: str, unit: str, results: Sequence[Result], value: Callable[[RequestRecord], float | None]
) -> str:
    lines: dict[str, Points] = {}
    for result in results:
        known = [value(one) for one in result.run.requests]
        lines[result.system] = distribution([v for v in known if v is not None])
    return line_chart(title, f"{unit}, logarithmic", "share of answered requests", lines, markers=False, log_x=True)


def _over_time(title: str, unit: str, results: Sequence[Result], value: Callable[[Run, Sample], float]) -> str:
    lines = {
        result.system: [(sample.time_s, value(result.run, sample)) for sample in result.run.samples]
        for result in results
    }
    return line_chart(title, "seconds", unit, lines, markers=False)


def _table(results: Sequence[Result]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ("system", "requests/s", *(c[0] for c in COLUMNS)))
    rows = []
    for result in results:
        cells = [html.escape(result.system), f"{result.rate:.2f}"]
        for _, value, form in COLUMNS:
            figure = value(result.summary)
            cells.append("" if figure is None else format(figure, form))
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(rows)}</table></div>'
