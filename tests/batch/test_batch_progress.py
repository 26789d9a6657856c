"""What people see of a batch job: progress while it runs, a summary at its end."""

import io
from datetime import datetime

import pytest
from rich.console import Console

from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch.observers import JobStart
from fineserve_jax.entrypoints.batch.progress import Bar, Lines, Pace, duration, reporter
from fineserve_jax.entrypoints.batch.summary import BatchSummary
from fineserve_jax.kv.usage import FormatUsage, KVCounts


class Terminal(io.StringIO):
    def isatty(self):
        return True


NO_COUNTS = KVCounts(0, 0, 0, 0, 0, 0, 0)


def stats(prompt_tokens, output_tokens, compilations, kv_bytes=0, **kv):
    usage = {name: FormatUsage(needed, reserved, 0, 0, 0, 0) for name, (needed, reserved) in kv.items()}
    return EngineStats(
        usage, kv_bytes, NO_COUNTS, 0, 0, prompt_tokens, output_tokens, 0.0, 0, 0, compilations, None, {}
    )


def so_far(answered=0, errors=0, output_tokens=0, sampled=None):
    summary = BatchSummary(errors=errors, sampled_tokens=output_tokens if sampled is None else sampled)
    for number in range(answered):
        summary.note_row(
            "int8", 1, output_tokens // answered if number else output_tokens % answered + output_tokens // answered
        )
    return summary


def test_a_terminal_gets_a_bar_and_everything_else_lines():
    assert isinstance(reporter(Terminal()), Bar)
    assert isinstance(reporter(Terminal(), plain=True), Lines)
    assert isinstance(reporter(io.StringIO()), Lines)


def test_the_bar_shows_rows_rate_errors_and_memory():
    stream = Terminal()
    with reporter(stream) as progress:
        progress.began(JobStart(8))
        progress.step(so_far(4, 1, 100), stats(0, 100, 0, 100, int8=(1, 25), bf16=(0, 0)))
        progress.note("[something] happened")
    for told in ("5/8", "tokens/s", "1 errors", "int8 25%", "[something] happened"):
        assert told in stream.getvalue()
    assert "bf16" not in stream.getvalue()


def fields(line):
    return dict(part.split("=", 1) for part in line.split())


def test_lines_come_every_ten_seconds_and_at_the_end():
    stream, now = io.StringIO(), 0.0
    with Lines(stream, clock=lambda: now) as progress:
        progress.began(JobStart(6))
        for rows, seconds in enumerate([1.0, 9.0, 10.0, 11.0, 20.0, 20.5], start=1):
            now = seconds
            progress.step(so_far(rows, 0, 10 * rows), stats(0, 10 * rows, 0, 100, int8=(1, 50)))
        progress.ended(so_far(6, 0, 60))
    told = [fields(line) for line in stream.getvalue().splitlines()]
    for line in told:
        datetime.fromisoformat(line.pop("time"))
    common = {"of": "6", "errors": "0", "kv_int8": "0.50"}
    assert told == [
        {**common, "rows": "3", "output_tokens": "30", "tokens_per_s": "3", "left_s": "10"},
        {**common, "rows": "5", "output_tokens": "50", "tokens_per_s": "2", "left_s": "4"},
        {**common, "rows": "6", "output_tokens": "60", "tokens_per_s": "3", "left_s": "0"},
    ]


def test_what_is_not_known_is_not_told():
    stream = io.StringIO()
    with Lines(stream, clock=lambda: 0.0) as progress:
        progress.began(JobStart(None))
        progress.ended(so_far(0, 2))
    told = fields(stream.getvalue())
    assert {name: told[name] for name in told if name != "time"} == {
        "rows": "2",
        "errors": "2",
        "output_tokens": "0",
        "tokens_per_s": "0",
    }


def test_the_time_that_is_left_is_learnt_from_the_lengths_of_answers():
    """Ten rows: four answered with 100 tokens, one an error; the five others are expected to get 80 each."""
    now = 0.0
    pace = Pace(lambda: now)
    pace.num_rows = 10
    assert pace.left_s(so_far(0, 0, 0, 50)) is None
    now = 50.0
    summary = so_far(4, 1, 400, sampled=500)
    pace.note(summary)
    assert pace.tokens_per_s == 10.0
    assert pace.left_s(summary) == (5 * 80 - 100) / 10.0


def test_the_rate_is_that_of_the_last_minute():
    now = 0.0
    pace = Pace(lambda: now)
    for second in range(1, 201):
        now = float(second)
        pace.note(BatchSummary(sampled_tokens=second if second <= 100 else 100 + 50 * (second - 100)))
    assert pace.tokens_per_s == 50.0


@pytest.mark.parametrize(("seconds", "told"), [(0.4, "0:00"), (59.6, "1:00"), (3599, "59:59"), (90061, "25:01:01")])
def test_durations_for_people(seconds, told):
    assert duration(seconds) == told


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

    with Lines(Gone()) as lines:
        lines.ended(so_far(5))
