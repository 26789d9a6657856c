"""Writes docs/quality.md, and the figures about quality in README.md, from what was measured.

python docs/quality_page.py

The figures lie in `docs/quality`, each run with the command that made it; `benchmarks/quality.py` makes them.
"""

import functools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown_table import table

ROOT = Path(__file__).parents[1]
PAGE, README = ROOT / "docs" / "quality.md", ROOT / "README.md"
FIGURES = ROOT / "docs" / "quality"
WINDOW, LONG_WINDOW, PAGE_SIZE = 1024, 8192, 16
LIMITS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
# What is hoped for: what, of which format, over windows of how many tokens; a bound and an aim, in the figure's unit.
AIMS = (
    ("rise", "int8", WINDOW, 0.2, 0.05),
    ("rise", "int4", WINDOW, 0.5, 0.2),
    ("kl", "int4", WINDOW, 0.02, 0.009),
    ("same_top", "int4", WINDOW, 93, 95),
    ("rise", "int3", WINDOW, 4, 1.5),
    ("rise", "int4", LONG_WINDOW, 1, 0.5),
)
UNITS = {"rise": (100, "+.2f", " %"), "kl": (1, ".4f", ""), "kl_p99": (1, ".3f", ""), "same_top": (100, ".1f", " %")}
NAMES = {"rise": "rise of perplexity", "kl": "KL divergence", "same_top": "same likeliest token"}

Row = Mapping[str, Any]


def page() -> str:
    """The page as it is now."""
    parts = (_formats(), _aims(), _choices(), _long(), _under_pressure(), _weights(), _answers(), _schemes(), _runs())
    return "\n\n".join(("# What a KV format costs in quality", _INTRODUCTION, *filter(None, parts))) + "\n"


def readme() -> str:
    """README.md with the figures that are there now."""
    lines = README.read_text(encoding="utf-8").split("\n")
    return "\n".join(_with_figure(line) for line in lines)


_INTRODUCTION = """`docs/quality_page.py` writes this page from the figures in `docs/quality`, all of them from
`fineserve-jax quality` ([what it measures](scores.md)) and from scripts that try schemes which are no formats. The
model is SmolLM2-135M with weights in fp32, unless something else is said; a small model bears less than a large one.
The text is the validation set of WikiText-2 (Merity et al., 2016), cut into consecutive windows, and everything is
compared with a KV cache in fp32 on the same windows. In brackets are 95 % intervals, bootstrapped over windows or
questions: what they do not exclude is not claimed. KL divergence is in nats a token. It is the surer guide where
windows are few."""


@functools.cache
def _run(name: str) -> Row | None:
    path = FIGURES / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _all_runs() -> Iterator[tuple[str, Row]]:
    for path in sorted(FIGURES.glob("*.json")):
        run = _run(path.stem)
        assert run is not None
        yield path.stem, run


def measured(window: int) -> dict[str, tuple[Row, Row]]:
    """By KV format its row and run: of those with such windows the run with the most; int3 with pages of 32 tokens."""
    found: dict[str, tuple[Row, Row]] = {}
    for _, run in _all_runs():
        for row in run.get("formats", ()) if run.get("window") == window and "schemes" not in run else ():
            name = row["kv_precision"]
            fits = run["page_size"] == (2 * PAGE_SIZE if name == "int3" else PAGE_SIZE)
            if fits and " " not in name and (name not in found or found[name][1]["windows"] < run["windows"]):
                found[name] = row, run
    return dict(sorted(found.items(), key=lambda item: item[1][0]["bits_per_value"]))


def shown(row: Row, figure: str) -> str:
    """A figure with its interval, such as "+0.35 % (+0.30 to +0.41)"."""
    unit, form, per_cent = UNITS[figure]
    value, low, high = (format(unit * row[figure][part], form) for part in ("value", "low", "high"))
    return f"{value}{per_cent} ({low} to {high})"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _quality_rows(rows: Iterable[tuple[str, Row, Row]]) -> str:
    head = (
        "",
        "bits a value",
        "bytes a token",
        "windows",
        "rise of perplexity",
        "KL divergence",
        "its 99th percentile",
    )
    cells = (
        (
            name,
            f"{row['bits_per_value']:.2f}",
            f"{row['kv_bytes_per_token']:,.0f}",
            str(run["windows"]),
            *(shown(row, figure) for figure in ("rise", "kl", "kl_p99", "same_top")),
        )
        for name, row, run in rows
    )
    return table((*head, "same likeliest token"), cells)


def _formats() -> str:
    found = measured(WINDOW)
    rows = _quality_rows((f"`{name}`", row, run) for name, (row, run) in found.items())
    wide = max((run for _, run in found.values()), key=lambda run: run["windows"])
    text = (
        f"Windows of {WINDOW:,} tokens; int3 with pages of {2 * PAGE_SIZE} tokens, the others with pages of "
        f"{PAGE_SIZE}. The perplexity in fp32 is {wide['wide_perplexity']['value']:.3f} over {wide['windows']} "
        "windows."
    )
    plot = "\n\n![Loss over bits a value](quality/formats.svg)" if (FIGURES / "formats.svg").exists() else ""
    return f"## KV formats\n\n{_wrapped(text)}\n\n{rows}{plot}"


def _aims() -> str:
    rows = []
    for figure, name, window, bound, aim in AIMS:
        if name not in (found := measured(window)):
            continue
        row, (unit, _, per_cent) = found[name][0], UNITS[figure]
        sign = -1 if figure == "same_top" else 1
        value, worst = (sign * unit * row[figure][part] for part in ("value", "low" if sign < 0 else "high"))
        met, limit = ("aim met", aim) if value <= sign * aim else ("within the bound", bound)
        surely = "" if worst <= sign * limit else ", not surely"
        verdict = met + surely if value <= sign * limit else "missed"
        side = "at least" if sign < 0 else "at most"
        what = f"`{name}`, {NAMES[figure]}, windows of {window:,}"
        rows.append((what, f"{side} {bound:g}{per_cent}", f"{aim:g}{per_cent}", shown(row, figure), verdict))
    return "## Against what was hoped for\n\n" + table(("", "bound", "aim", "measured", ""), rows)


def _choices() -> str:
    ordered = sorted(measured(WINDOW).items(), key=lambda item: item[1][0]["bits_per_value"])
    rows = []
    for limit in LIMITS:
        fitting = (name for name, (row, _) in ordered if 100 * row["rise"]["high"] <= limit)
        rows.append((f"{limit:g} %", f"`{next(fitting, 'fp32')}`"))
    text = (
        "By the rule of `--max-loss`: the fewest bits whose rise of perplexity, its whole interval, is at most "
        "that. fp32 stands for: none of the others surely is."
    )
    return f"## Which to take\n\n{_wrapped(text)}\n\n{table(('loss that is bearable', 'format'), rows)}"


def _long() -> str | None:
    windows = sorted({run["window"] for _, run in _all_runs() if run.get("window", 0) > WINDOW})
    if not windows:
        return None
    rows = (
        (f"`{name}`, {window:,} tokens", row, run)
        for window in windows
        for name, (row, run) in measured(window).items()
    )
    return f"## Long windows\n\n{_quality_rows(rows)}"


def _under_pressure() -> str | None:
    rows = [
        (f"{row['pressure']:g}, windows of {run['window']:,}", row, run)
        for _, run in _all_runs()
        for row in run.get("under_pressure", ())
    ]
    if not rows:
        return None
    text = (
        "`auto` while requests want so many times the memory that there is: each may hold its share of what its "
        "tokens would take in bf16, and its oldest are narrowed for that, as they come. Bits are those at the end "
        "of windows, whose beginnings cost nothing."
    )
    return f"## `auto` under pressure\n\n{_wrapped(text)}\n\n{_quality_rows(rows)}"


def _weights() -> str | None:
    rows = [
        (row["weights"], str(run["windows"]), *(shown(row, figure) for figure in ("rise", "kl", "kl_p99", "same_top")))
        for _, run in _all_runs()
        for row in run.get("other_weights", ())
    ]
    if not rows:
        return None
    head = ("weights", "windows", "rise of perplexity", "KL divergence", "its 99th percentile", "same likeliest token")
    text = "With the KV cache in fp32. The checkpoint's own have 4 bits (Q4_1)."
    return f"## Weights\n\n{_wrapped(text)}\n\n{table(head, rows)}"


def _answers() -> str | None:
    rows = []
    for _, run in _all_runs():
        for task, of_task in run.get("answers", {}).items():
            for row in of_task:
                name = row["kv_precision"] + (f", pressure {row['pressure']:g}" if row.get("pressure") else "")
                cells = (tuple(100 * row[key][part] for part in ("value", "low", "high")) for key in ("right", "same"))
                rows.append((task, f"`{name}`", *("{:.0f} % ({:.0f} to {:.0f})".format(*cell) for cell in cells)))
    if not rows:
        return None
    return "## Answers\n\n" + table(("questions", "KV format", "right", "answered as in fp32"), rows)


def _schemes() -> str | None:
    parts = []
    if (run := _run("schemes-3-bits")) is not None:
        head = ("scheme", "tokens a page", "rise of perplexity", "KL divergence", "same likeliest token")
        rows = (
            (row["scheme"], str(row["page_size"]), *(shown(row, figure) for figure in ("rise", "kl", "same_top")))
            for row in run["schemes"]
        )
        text = (
            "`benchmarks/narrow_schemes.py` tries them in a forward pass that rounds keys, or values, or both, "
            "after they are rotated; what a line does not name is exact, but for a token's own page, which is in "
            "int8. Ranges are those of a channel of keys over a page, or of a token's values: in 8 + 8 bits, a zero "
            f"point and a scale, unless something else is said. {run['windows']} windows of {run['window']} tokens. "
            "[What follows from it](design.md#int3)."
        )
        parts.append(f"## Ways to about 3 bits\n\n{_wrapped(text)}\n\n{table(head, rows)}")
    if (run := _run("schemes-4-bits")) is not None:
        head = ("scheme", "bits a value", "rise of perplexity", "KL divergence", "same likeliest token")
        rows = (
            (
                row["kv_precision"],
                f"{row['bits_per_value']:.2f}",
                *(shown(row, figure) for figure in ("rise", "kl", "same_top")),
            )
            for row in run["formats"]
        )
        text = (
            "`benchmarks/kv_quality.py` tries them as formats, the newest page in int8. Bits are those of packed "
            f"pages. {run['windows']} windows of {run['window']} tokens."
        )
        parts.append(f"## Ways to about 4 bits\n\n{_wrapped(text)}\n\n{table(head, rows)}")
    return "\n\n".join(parts) or None


def _runs() -> str:
    lines = (f"- [`{name}`](quality/{name}.json): `{run['command']}`" for name, run in _all_runs())
    return "## The runs\n\n" + "\n".join(lines)


def _with_figure(line: str) -> str:
    """A row of README's table of formats with its bits and its rise of perplexity; other lines as they are."""
    row = re.fullmatch(r"\| `(\w+)` \| [\d.]+ \|[^|]*\| (.*) \|", line)
    if row is None:
        return line
    name, how = row.groups()
    if name not in (found := measured(WINDOW)):
        return line
    of_name = found[name][0]
    bits = f"{of_name['bits_per_value']:.2f}".removesuffix(".00")
    return f"| `{name}` | {bits} | {shown(of_name, 'rise')} | {how} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
