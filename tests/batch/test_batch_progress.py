"""What people see of a batch job: progress while it runs, a summary at its end."""

import io

from rich.console import Console

from fineserve_jax.batch.progress import Bar, Lines, reporter
from fineserve_jax.batch.summary import BatchSummary
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.kv.usage import FormatUsage, KVCounts


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_terminal_gets_a_bar_and_everything_else_lines():
    assert isinstance(reporter(Terminal(), 3), Bar)
    assert isinstance(reporter(Terminal(), 3, plain=True), Lines)
    assert isinstance(reporter(io.StringIO(), 3), Lines)


def test_the_bar_shows_rows_and_rate():
    stream = Terminal()
    with reporter(stream, 8) as progress:
        progress.update(5, 100)
    assert "5/8" in stream.getvalue()
    assert "tokens/s" in stream.getvalue()


def test_lines_come_every_ten_seconds_and_at_the_end():
    stream, now = io.StringIO(), 0.0
    with Lines(stream, 6, clock=lambda: now) as progress:
        for rows, seconds in enumerate([1.0, 9.0, 10.0, 11.0, 20.0, 20.5], start=1):
            now = seconds
            progress.update(rows, 10 * rows)
    assert stream.getvalue().splitlines() == [
        "3 of 6 rows, 30 output tokens, 3 tokens/s",
        "5 of 6 rows, 50 output tokens, 2 tokens/s",
        "6 of 6 rows, 60 output tokens, 3 tokens/s",
    ]


def test_the_last_line_is_not_said_twice():
    stream, now = io.StringIO(), 0.0
    with Lines(stream, None, clock=lambda: now) as progress:
        now = 10.0
        progress.update(1, 20)
    assert stream.getvalue() == "1 rows, 20 output tokens, 2 tokens/s\n"


NO_COUNTS = KVCounts(0, 0, 0, 0, 0, 0, 0)


def stats(prompt_tokens, output_tokens, compilations, **kv):
    usage = {name: FormatUsage(needed, reserved, 0, 0, 0, 0) for name, (needed, reserved) in kv.items()}
    return EngineStats(usage, 0, NO_COUNTS, 0, 0, prompt_tokens, output_tokens, 0.0, 0, 0, compilations, None, {})


def test_the_decode_rate_leaves_out_prompts_and_compilation():
    summary = BatchSummary()
    summary.note_step(stats(0, 0, 0), stats(9, 1, 0), seconds=100.0)  # a prompt
    summary.note_step(stats(9, 1, 0), stats(9, 2, 4), seconds=100.0)  # compiled
    assert summary.decode_tokens_per_s == 0.0
    summary.note_step(stats(9, 2, 4), stats(9, 8, 4), seconds=2.0)
    assert summary.decode_tokens_per_s == 3.0
    assert summary.compilations == 4


def test_peaks_are_the_largest_seen_of_formats_in_use():
    summary = BatchSummary()
    for int8 in [(10, 20), (40, 50), (30, 60)]:
        summary.note_step(stats(0, 0, 0), stats(0, 1, 0, int8=int8, bf16=(0, 0)), seconds=1.0)
    assert set(summary.formats) == {"int8"}
    assert (summary.formats["int8"].peak_needed_bytes, summary.formats["int8"].peak_reserved_bytes) == (
        40,
        60,
    )


def test_the_table_fits_eighty_columns_and_names_every_format():
    summary = BatchSummary(errors=123_456, skipped=7, interrupted=True, seconds=12_345.6)
    for name in ("int4", "bf16"):
        summary.note_row(name, 123_456_789, 123_456_789)
        summary.formats[name].peak_reserved_bytes = 1000 * 2**30
    stream = io.StringIO()
    Console(file=stream, width=80).print(summary.table())
    text = stream.getvalue()
    assert "Interrupted: 2 answered, 123456 errors, 7 answered earlier, in 12345.6 s" in text
    assert "…" not in text
    for part in ("int4", "bf16", "123456789", "1000.0 GiB"):
        assert part in text


def test_a_reader_that_has_gone_ends_no_job():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    with Lines(Gone(), 5) as lines:
        lines.update(5, 20)
