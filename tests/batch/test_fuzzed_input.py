"""Whatever an input holds, the job ends by itself, with a row of output for each line: an answer, or an error."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from job_cases import written
from stub_engine import StubEngine

from fineserve_jax.entrypoints.batch import run_batch
from fineserve_jax.entrypoints.openai_api import fields

GOOD = b'{"prompt": "abc", "max_tokens": 2}'
TEXT = st.text(st.characters(exclude_categories=()), max_size=8)  # half of a surrogate pair is JSON, too
NUMBERS = st.integers() | st.floats() | st.sampled_from([10**400, -(2**63) - 1, 2**64, 1e308, 5e-324])
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(TEXT, x, max_size=3),
    max_leaves=6,
)
PROMPTS = st.fixed_dictionaries({}, optional={"prompt": JSON, "messages": JSON, "id": JSON})
FIELDS = st.dictionaries(st.sampled_from(("id", *fields.FIELDS)), JSON, max_size=4)
OPENAI = st.dictionaries(st.sampled_from(["custom_id", "method", "url", "body"]), JSON | PROMPTS, max_size=4)
DEEP = st.integers(1, 4000).map(lambda depth: b'{"prompt": "a", "tools": ' + b"[" * depth + b"]" * depth + b"}")
LINES = st.one_of(
    st.binary(max_size=60),
    st.just(GOOD),
    DEEP,
    st.builds(lambda prompt, fields: json.dumps({**prompt, **fields}).encode(), PROMPTS, FIELDS),
    OPENAI.map(lambda row: json.dumps(row).encode()),
    st.builds(lambda row, at: json.dumps(row).encode()[:at], FIELDS, st.integers(0, 80)),
    st.builds(lambda row, at, byte: flipped(json.dumps(row).encode(), at, byte), FIELDS, st.integers(0), st.binary()),
)


def flipped(line, at, byte):
    at %= len(line)
    return line[:at] + byte[:1] + line[at + 1 :]


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(LINES.map(lambda line: line.replace(b"\n", b" ")), min_size=1, max_size=12), st.booleans())
def test_every_line_has_its_answer_or_its_error(tmp_path, lines, ordered):
    lines = [GOOD, *lines]  # what begins otherwise may be another kind of file, which is refused as a whole
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    summary = run_batch(
        "stub",
        tmp_path / "in.jsonl",
        tmp_path / "out.jsonl",
        sampling={"max_tokens": 3},
        make_engine=StubEngine,
        overwrite=True,
        ordered=ordered,
    )
    rows = written(tmp_path / "out.jsonl")
    expected = [number for number, line in enumerate(lines, start=1) if line.strip()]
    assert len(rows) == summary.rows == len(expected)
    errors = [row for row in rows if row.get("error") is not None]
    places = [row["error"] if isinstance(row["error"], dict) else row for row in errors]
    assert len({place["line"] for place in places}) == len(errors) == summary.errors
    assert {place["line"] for place in places} <= set(expected)
    for row in rows:
        assert "fault of fineserve-jax" not in json.dumps(row)


def test_lines_of_50_mb_and_more_are_errors_and_the_others_are_answered(tmp_path):
    long, longer = b'{"prompt": "' + b"a" * (50 << 20) + b'"}', b"[" * (70 << 20)
    nul = b'{"prompt": "a\x00b"}'
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([GOOD, long, longer, nul, b"\x00" * 1000, GOOD]))
    summary = run_batch("stub", tmp_path / "in.jsonl", tmp_path / "out.jsonl", make_engine=StubEngine)
    rows = {row.get("line", row["id"]): row for row in written(tmp_path / "out.jsonl")}
    assert (summary.answered, summary.errors) == (2, 4)
    assert set(rows) == {1, 2, 3, 4, 5, 6}
    assert rows[2]["error"].startswith("the prompt has 52428800 characters, which are at least ")
    assert rows[3]["error"] == "line 3 has more than 64 MiB, which no prompt needs; shorten it"
    assert rows[4]["error"].startswith("line 4 is not JSON: Invalid control character")
    assert rows[5]["error"].startswith("line 5 is not JSON: ")


@pytest.mark.parametrize("depth", [10, 400, 990, 5000, 1_000_000])
def test_deep_values_are_taken_or_refused_for_their_rows(tmp_path, depth):
    fields = ("id", "tools", "stop", "logit_bias", "chat_template_kwargs", "priority", "prompt", "messages")
    lines = [b'{"prompt": "a", "%s": %s}' % (name.encode(), b"[" * depth + b"]" * depth) for name in fields]
    lines += [b'{"custom_id": "a", "body": %s}' % (b'{"a":' * depth + b"1" + b"}" * depth), GOOD]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    summary = run_batch("stub", tmp_path / "in.jsonl", tmp_path / "out.jsonl", make_engine=StubEngine)
    assert len(written(tmp_path / "out.jsonl")) == summary.rows == len(lines)
    assert summary.answered >= 1
    assert summary.error_kinds["internal_error"] == 0
