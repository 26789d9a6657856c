"""The report of a batch job: one HTML page that opens offline, on a phone too."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from fineserve_jax.engine.memory import format_bytes
from fineserve_jax.engine.output_files import check_can_write
from fineserve_jax.entrypoints.batch.report_html import as_text, table
from fineserve_jax.entrypoints.batch.report_sections import ReportSection, section_html
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.entrypoints.cli.batch_record import BatchRecord, Distribution, rates, told_options
from fineserve_jax.errors import ConfigError
from fineserve_jax.sim.charts import COLOURS, Points, line_chart

STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { font: 16px/1.45 system-ui, sans-serif; margin: 0 auto; padding: 1rem; max-width: 62rem; color: #222;
  background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.4rem; margin: 0 0 .2rem } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem }
p { margin: .3rem 0 } .quiet { color: #555 }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: 1rem 0 }
.tile { border: 1px solid #ddd; border-radius: .5rem; padding: .5rem .7rem }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums }
.tile.bad { border-color: #d55e00; background: #fff4ec }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .6rem }
svg { width: 100%; height: auto; border: 1px solid #eee; border-radius: .5rem }
.wide { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
td, th { padding: .3rem .6rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
td { white-space: nowrap } .text { white-space: normal; min-width: 14rem }
td:first-child, th:first-child, .text { text-align: left }
td:first-child, th { overflow-wrap: normal; white-space: normal }
@media (max-width: 40rem) { svg text { font-size: 13px } }
.bar { height: .7rem; border-radius: .35rem; background: #eee; overflow: hidden; display: flex; margin: .4rem 0 }
.bar span { display: block; height: 100% }
details { margin: .5rem 0 } summary { cursor: pointer }
"""
SHARES = (0.5, 0.9, 0.99)
BEGIN = '<!doctype html><html lang="en">'


def check_report(path: Path) -> None:
    """Raises `ConfigError`, before the job begins, for a report that could not be written at its end, or that would
    take the place of a file that is none."""
    check_can_write("report", path)
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(BEGIN)) not in (b"", BEGIN.encode()):
                raise ConfigError(f"report={str(path)!r} is a file that is no report; name another, or remove it")


def write_report(record: BatchRecord, path: Path, sections: Iterable[ReportSection] = ()) -> None:
    """Writes the page. Raises ConfigError if the file cannot be written."""
    try:
        path.write_text(page(record, sections), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the report {path}: {error.strerror}") from None


def page(record: BatchRecord, sections: Iterable[ReportSection] = (), now: datetime | None = None) -> str:
    """The page as text. `sections`: that others add; `now`: when it is written."""
    summary = record.summary or BatchSummary()
    name = record.start.output or "answers"
    parts = [
        f'{BEGIN}<head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{as_text(f'Batch job: {name}')}</title><style>{STYLE}</style></head><body>",
        f"<h1>Batch job: {as_text(name)}</h1>",
        f'<p class="quiet">{as_text(_state(record, now or datetime.now(UTC)))}</p>',
        _tiles(summary),
        "<h2>Over time</h2>",
        _over_time(record),
        "<h2>How long rows took</h2>",
        _charts([_latency_chart(record), _lengths_chart(record)]),
        _quantiles(record),
        "<h2>Prefixes</h2>",
        _prefixes(summary),
        "<h2>KV precisions</h2>",
        _precisions(summary),
        "<h2>How answers ended</h2>",
        _counts("finish reason", "answers", record.finish_reasons),
        "<h2>Errors</h2>",
        _errors(record),
        *map(section_html, sections),
        _about(record),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _state(record: BatchRecord, now: datetime) -> str:
    inputs, summary = ", ".join(record.start.inputs), record.summary
    ended = "was cut short" if summary is None else "was interrupted" if summary.interrupted else "is done"
    of = f" from {inputs}" if inputs else ""
    return f"Rows{of}. The job {ended}; written {now.astimezone():%Y-%m-%d %H:%M %Z}."


def _tiles(summary: BatchSummary) -> str:
    overall = summary.output_tokens / summary.seconds if summary.seconds else 0.0
    tiles = [
        ("rows answered", f"{summary.answered:,}", False),
        ("errors", f"{summary.errors:,}", summary.errors > 0),
        *([("answered earlier", f"{summary.skipped:,}", False)] if summary.skipped else []),
        *([("late", f"{summary.late:,}", True)] if summary.late else []),
        ("time", _duration(summary.seconds), False),
        ("output tokens", f"{summary.output_tokens:,}", False),
        ("tokens/s", f"{overall:,.0f}", False),
        ("tokens/s decoding", f"{summary.decode_tokens_per_s:,.0f}", False),
        ("preemptions", f"{summary.preemptions:,}", False),
        ("pages narrowed", f"{summary.narrowed_pages:,}", False),
        ("compilations", f"{summary.compilations:,}", False),
    ]
    shown = (f'<div class="tile{" bad" if bad else ""}"><b>{value}</b>{name}</div>' for name, value, bad in tiles)
    return f'<div class="tiles">{"".join(shown)}</div>'


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


# -- charts --------------------------------------------------------------------------------------------------------


def _charts(charts: Iterable[str]) -> str:
    return f'<div class="charts">{"".join(charts)}</div>'


def _over_time(record: BatchRecord) -> str:
    samples = record.samples
    if len(samples) < 2:
        return "<p>The job was too short to tell.</p>"
    tokens = {
        "output": rates(samples, lambda sample: sample.output_tokens),
        "prompt": rates(samples, lambda sample: sample.prompt_tokens),
    }
    formats = dict.fromkeys(name for sample in samples for name in sample.kv_shares)
    memory = {name: [(s.time_s, s.kv_shares.get(name, 0.0)) for s in samples] for name in formats}
    queues = {
        "running": [(sample.time_s, float(sample.running)) for sample in samples],
        "waiting": [(sample.time_s, float(sample.waiting)) for sample in samples],
    }
    done = {"rows": [(sample.time_s, float(sample.rows)) for sample in samples]}
    return _charts(
        line_chart(title, "seconds", unit, lines, markers=False)
        for title, unit, lines in (
            ("throughput", "tokens/s", tokens),
            ("rows done", "rows", done),
            ("KV memory in use", "share of the memory", memory),
            ("requests", "requests", queues),
        )
    )


def _latency_chart(record: BatchRecord) -> str:
    lines = {"first token": record.ttft_s, "whole row": record.total_s, "a token": record.s_per_token}
    return _distributions("latencies", "seconds, logarithmic", lines)


def _lengths_chart(record: BatchRecord) -> str:
    lines = {"prompt": record.prompt_tokens, "output": record.output_tokens}
    return _distributions("lengths", "tokens, logarithmic", lines)


def _distributions(title: str, unit: str, parts: Mapping[str, Distribution]) -> str:
    lines: dict[str, Points] = {name: part.cumulative() for name, part in parts.items() if part.total}
    return line_chart(title, unit, "share at or under", lines, markers=False, log_x=True)


# -- tables --------------------------------------------------------------------------------------------------------


def _quantiles(record: BatchRecord) -> str:
    parts = (
        ("in the queue, s", record.queue_s, ".3g"),
        ("to the first token, s", record.ttft_s, ".3g"),
        ("per further token, s", record.s_per_token, ".3g"),
        ("whole row, s", record.total_s, ".3g"),
        ("prompt tokens", record.prompt_tokens, ".0f"),
        ("output tokens", record.output_tokens, ".0f"),
    )
    rows = [(name, *(format(part.quantile(s), form) for s in SHARES)) for name, part, form in parts if part.total]
    return table(("", *(f"{share:.0%}" for share in SHARES)), rows) if rows else "<p>No row was answered.</p>"


def _precisions(summary: BatchSummary) -> str:
    if not summary.formats:
        return "<p>No row was answered.</p>"
    names, total = sorted(summary.formats), max(summary.answered, 1)
    spans = "".join(
        f'<span style="width:{100 * summary.formats[name].rows / total:.2f}%;background:{COLOURS[i % len(COLOURS)]}" '
        f'title="{as_text(name)}"></span>'
        for i, name in enumerate(names)
    )
    rows = [
        (
            name,
            f"{part.rows:,}",
            f"{part.prompt_tokens:,}",
            f"{part.output_tokens:,}",
            format_bytes(part.peak_needed_bytes),
            format_bytes(part.peak_reserved_bytes),
        )
        for name, part in sorted(summary.formats.items())
    ]
    head = ("KV precision", "rows", "prompt tokens", "output tokens", "peak needed", "peak reserved")
    return f'<div class="bar">{spans}</div>{table(head, rows)}'


def _prefixes(summary: BatchSummary) -> str:
    asked = summary.prompt_tokens
    saved = min(summary.hit_tokens / asked, 1.0) if asked else 0.0
    bar = f'<div class="bar"><span style="width:{100 * saved:.2f}%;background:{COLOURS[2]}"></span></div>'
    told = f"{summary.hit_tokens:,} prompt tokens were shared with other rows or samples and not computed again"
    return f"{bar}<p>{told}: {saved:.1%} of those of the answered rows.</p>"


def _counts(kind: str, what: str, counts: Mapping[str, int]) -> str:
    rows = [(name, f"{count:,}") for name, count in sorted(counts.items(), key=lambda item: -item[1])]
    return table((kind, what), rows) if rows else "<p>None.</p>"


def _errors(record: BatchRecord) -> str:
    kinds = sorted(record.errors.items(), key=lambda item: -item[1].count)
    rows = [
        (code, f"{kind.count:,}", kind.example.line, f"id {kind.example.id!r}: {kind.example.error}")
        for code, kind in kinds
    ]
    return table(("kind", "rows", "first line", "what is said of it"), rows, text=(3,)) if rows else "<p>None.</p>"


def _about(record: BatchRecord) -> str:
    parts = ["<h2>The job</h2>"]
    if len(record.models) > 1:
        parts.append(_counts("model", "rows", record.models))
    if record.notes:
        parts.append(f"<ul>{''.join(f'<li>{as_text(note)}</li>' for note in record.notes)}</ul>")
    options = told_options(record.start.options)
    parts.append(f"<details><summary>Options</summary>{table(('option', 'value'), options, text=(1,))}</details>")
    return "\n".join(parts)
