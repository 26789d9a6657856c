"""The batch job on a real engine with a tiny model."""

import json
import math

import pytest
from job_cases import GREEDY, OnStep, alone, by_id, run_job, without_timing, written
from tiny_model import tiny_tokenizer, with_nan

from fineserve_jax import CompletionOutput, Engine, RequestError, RequestMetrics, RequestOutput
from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows, as_line
from fineserve_jax.entrypoints.batch.journal import journal_path
from fineserve_jax.entrypoints.batch.rows import BatchRow
from fineserve_jax.runner.results import TokenLogprobs


@pytest.fixture
def answer(engine, tmp_path):
    """Answers rows (objects, or raw lines) and gives the rows of the output, in order; and the summary."""

    def run(rows, sampling=GREEDY, resume=False, on_step=None):
        observers = [] if on_step is None else [OnStep(on_step)]
        summary = run_job(engine, rows, tmp_path / "answers.jsonl", sampling, resume=resume, observers=observers)
        return written(tmp_path / "answers.jsonl"), summary

    return run


def test_every_row_is_answered_in_its_own_precision_as_if_alone(engine, answer):
    prompts = [f"prompt number {i}" + "!" * (3 * i) for i in range(9)]
    precisions = ["int4", "int8", None]
    rows = [{"prompt": p, "kv_precision": precisions[i % 3], "max_tokens": 3 + i} for i, p in enumerate(prompts)]
    answers, summary = answer(rows)
    answers = by_id(answers)
    for i, prompt in enumerate(prompts):
        kv_precision = precisions[i % 3] or "int4"
        kept = len(prompt) + 2 + i  # all but the last token
        in_pages = kept // 16 * 16 if kv_precision == "int4" else 0
        timing = answers[i + 1].pop("timing")
        assert 0 <= timing["queue_s"] <= timing["ttft_s"] <= timing["total_s"]
        assert (timing["num_preemptions"], timing["attempts"]) == (0, 1)
        assert answers[i + 1] == {
            "id": i + 1,
            "text": alone(engine, prompt, kv_precision, max_tokens=3 + i),
            "finish_reason": "length",
            "prompt_tokens": len(prompt),
            "output_tokens": 3 + i,
            "kv_precision": kv_precision,
            "kv_tokens": {name: count for name, count in (("int4", in_pages), ("int8", kept - in_pages)) if count},
        }
    assert (summary.answered, summary.errors, summary.skipped) == (9, 0, 0)
    assert summary.formats["int8"].rows == 3
    assert summary.formats["int4"].prompt_tokens == sum(len(p) for i, p in enumerate(prompts) if i % 3 != 1)
    assert summary.output_tokens == sum(3 + i for i in range(9))
    for part in summary.formats.values():
        assert 0 < part.peak_needed_bytes <= part.peak_reserved_bytes
    assert summary.decode_tokens_per_s > 0


def test_rows_have_the_form_that_they_ask_for_or_an_error_that_names_what_is_not_supported(answer):
    schema = {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2, "maxItems": 2}
    json_schema = {"type": "json_schema", "json_schema": {"name": "pair", "schema": schema, "strict": True}}
    rows = [
        {"id": "choice", "prompt": "abc", "structured_outputs": {"choice": ["one", "two"]}},
        {"id": "schema", "prompt": "abc", "max_tokens": 50, "response_format": json_schema},
        {"id": "none", "prompt": "abc", "response_format": {"type": "text"}},
        {"id": "default", "prompt": "abc"},
        {"id": "place", "prompt": "a", "structured_outputs": {"json": {"items": {"uniqueItems": True}}}},
        {"id": "brace", "prompt": "a", "structured_outputs": {"regex": "a}"}},
    ]
    answers, summary = answer(rows, {**GREEDY, "structured_outputs": {"regex": "[x-z]{3}"}})
    answers = by_id(answers)
    assert answers["choice"]["text"] in ("one", "two")
    assert json.loads(answers["schema"]["text"]) in ([1, 1], [1, 2], [2, 1], [2, 2])
    assert set(answers["default"]["text"]) <= set("xyz")
    assert len(answers["default"]["text"]) == 3
    assert not set(answers["none"]["text"]) <= set("xyz")
    assert 'at #/items/uniqueItems: "uniqueItems" is not supported' in answers["place"]["error"]
    assert "no token of the model continues the text" in answers["brace"]["error"]  # it has no } at all
    assert (summary.answered, summary.errors) == (4, 2)


def test_bad_rows_become_error_rows_and_the_others_are_answered(answer):
    good = {"prompt": "abc"}
    bad = [
        b'{"prompt": "abc"',
        {"id": "missing"},
        {"id": "long", "prompt": "x" * 128},
        {"id": "empty", "prompt": []},
        {"id": "token", "prompt": [96]},
        {"id": "format", "prompt": "abc", "kv_precision": "int3"},
        {"id": "hot", "prompt": "abc", "temperature": -1},
        {"id": "field", "prompt": "abc", "temprature": 1},
        {"id": "words", "prompt": "abc", "max_tokens": "many"},
        {"id": "messages", "messages": [{"role": "user"}]},
        {"id": "surrogate", "prompt": "\ud800"},
    ]
    rows = [row for pair in zip([good] * len(bad), bad, strict=True) for row in pair] + [good]
    answers, summary = answer(rows)
    answers = by_id(answers)
    errors = {key: row for key, row in answers.items() if "error" in row}
    assert (summary.answered, summary.errors) == (len(bad) + 1, len(bad))
    assert len(errors) == len(bad)
    assert sorted(row["line"] for row in errors.values()) == [2 * i + 2 for i in range(len(bad))]
    assert all(set(row) == {"id", "line", "error"} for row in errors.values())
    expected = {
        2: "line 2 is not JSON",
        "missing": "neither prompt nor messages",
        "long": "128 tokens; with max_seq_len=128 it may have 127",
        "empty": "the prompt is empty",
        "token": "token 96",
        "format": "kv_precision='int3' is not served; choose one of .*int8",
        "hot": "temperature=-1: .*greater than or equal to 0",
        "field": "unknown field 'temprature'",
        "words": "max_tokens='many'",
        "messages": "content of type NoneType",
        "surrogate": "not valid Unicode",
    }
    for key, pattern in expected.items():
        with pytest.raises(RequestError, match=pattern):
            raise RequestError(errors[key]["error"])


def test_a_row_whose_numbers_are_not_finite_is_an_error_row_and_the_others_are_answered(engine, tmp_path):
    (bad,) = engine.tokenizer.encode("{")
    spoilt = Engine(with_nan(engine.model, bad), engine.config)
    rows = [
        {"id": "nan", "prompt": "a{b", "logprobs": 2, "max_tokens": 2},
        {"id": "good", "prompt": "abc", "logprobs": 2, "logit_bias": {bad: -100.0}},
        {"id": "samples", "prompt": "{", "n": 2, "temperature": 1.0},
    ]
    summary = run_job(spoilt, rows, tmp_path / "answers.jsonl", GREEDY)
    answers = by_id(written(tmp_path / "answers.jsonl"))
    for name, line in (("nan", 1), ("samples", 3)):
        assert answers[name].keys() == {"id", "line", "error"}
        assert answers[name]["line"] == line
        assert "the logits of model 'tiny' are not finite" in answers[name]["error"]
    assert answers["good"]["text"] == alone(engine, "abc", None)
    assert (summary.answered, summary.errors) == (1, 2)
    assert not spoilt.has_unfinished
    assert not spoilt.detokenizers


def test_a_log_probability_of_minus_infinity_is_null(engine):
    """A model may exclude a token; JSON has no infinity."""
    sample = CompletionOutput(0, "a", [5], [TokenLogprobs(-0.5, {5: -0.5, 6: -math.inf})], "length")
    output = RequestOutput("r", None, [4], "tiny", "int4", {}, [sample], RequestMetrics(0.0, 0.0, 0.0, 0))
    line = as_line(AnswerRows().answer(BatchRow(1, "r", prompt="a"), output, engine.tokenizer))
    (entry,) = json.loads(line, parse_constant=pytest.fail)["logprobs"]
    assert [other["logprob"] for other in entry["top"]] == [-0.5, None]
    with pytest.raises(ValueError, match="not JSON compliant"):
        as_line({"id": "r", "logprob": math.nan})


def test_ids_must_differ(answer):
    rows = [{"id": "a", "prompt": "x"}, {"id": "a", "prompt": "y"}, {"id": 4, "prompt": "z"}, {"prompt": "w"}]
    answers, _ = answer(rows)
    errors = {row["line"]: row["error"] for row in answers if "error" in row}
    assert errors == {
        2: "id 'a' is that of line 1; give every row an id of its own, or none",
        4: "id 4 is that of line 3; give every row an id of its own, or none",
    }
    assert {row["id"] for row in answers if "error" not in row} == {"a", 4}


def test_ids_of_any_type_are_carried_through_and_told_apart_on_resuming(answer):
    ids = ["1", 1.5, True, [1, {"a": None}], {"b": [], "a": 0.1}, 10**20]
    rows = [{"id": own, "prompt": "x"} for own in ids]
    answers, _ = answer(rows)
    assert sorted(json.dumps(row["id"]) for row in answers) == sorted(map(json.dumps, ids))
    again = [{"id": {"a": 0.1, "b": []}, "prompt": "x"}, {"id": 1e20, "prompt": "x"}, {"id": [1], "prompt": "x"}]
    answers, summary = answer(rows + again, resume=True)
    assert (summary.answered, summary.skipped, summary.errors) == (1, 6, 2)
    assert {row["line"]: row["error"] for row in answers if "error" in row} == {
        7: "id {'a': 0.1, 'b': []} is that of line 5; give every row an id of its own, or none",
        8: "id 1e+20 is that of line 6; give every row an id of its own, or none",
    }


def test_null_fields_and_openais_names_are_answered_as_the_defaults(answer):
    fields = [{name: None} for name in ("stop", "logit_bias", "temperature", "top_p", "n", "seed", "logprobs")]
    fields += [{"logprobs": False}, {"top_k": -1}, {"max_completion_tokens": 6, "max_tokens": None}]
    answers, summary = answer([{"prompt": "abc", **own} for own in ({}, *fields)])
    assert (summary.answered, summary.errors) == (len(fields) + 1, 0)
    assert len({row["text"] for row in answers}) == 1
    assert all("logprobs" not in row for row in answers)
    (row,), _ = answer([{"prompt": "abc", "logprobs": True, "top_logprobs": 3}])
    assert [len(entry["top"]) for entry in row["logprobs"]] == [3] * 6


class Panic(BaseException):
    """As a panic of Rust code reaches Python: no `Exception`."""


@pytest.mark.parametrize("error", [TypeError, OverflowError, MemoryError, RecursionError, Panic])
def test_a_row_that_fails_unforeseen_is_an_error_row_and_the_others_are_answered(engine, answer, monkeypatch, error):
    prepare = engine.prepare

    def fail(tokens, sampling, options):
        if len(tokens) == 3:
            raise error("its reason")
        return prepare(tokens, sampling, options)

    monkeypatch.setattr(engine, "prepare", fail)
    answers, summary = answer([{"prompt": "a"}, {"id": "bad", "prompt": "abc"}, {"prompt": "b"}])
    assert (summary.answered, summary.errors) == (2, 1)
    [row] = [row for row in answers if "error" in row]
    assert row == {
        "id": "bad",
        "line": 2,
        "error": f"the row cannot be prepared: {error.__name__}: its reason; "
        "this is a fault of fineserve-jax, please report it with the row",
    }


class Counted:
    """A backend that notes what it encodes."""

    def __init__(self, backend):
        self.backend, self.encoded = backend, []

    def __getattr__(self, name):
        return getattr(self.backend, name)

    def encode(self, text, **options):
        self.encoded.append(text)
        return self.backend.encode(text, **options)


def test_a_prompt_of_far_too_many_characters_is_never_tokenized(engine, answer):
    kept = engine.tokenizer.backend
    counted = Counted(kept)
    object.__setattr__(engine.tokenizer, "backend", counted)
    try:
        long = "x" * 10**6
        chat = [{"role": "user", "content": long}]
        answers, summary = answer([{"prompt": long}, {"messages": chat}, {"prompt": "abc"}])
    finally:
        object.__setattr__(engine.tokenizer, "backend", kept)
    assert (summary.answered, summary.errors) == (1, 2)
    assert counted.encoded == ["abc"]
    errors = [row["error"] for row in answers if "error" in row]
    assert errors[0].startswith(
        "the prompt has 1000000 characters, which are at least 200000 tokens; it may have 127; "
    )


def test_a_bad_row_leaves_its_id_to_a_good_one(answer):
    rows = [b"{", {"id": 1, "prompt": "x"}, {"id": "a"}, {"id": "a", "prompt": "y"}]
    answers, summary = answer(rows)
    assert {row["line"] for row in answers if "error" in row} == {1, 3}
    assert {row["id"] for row in answers if "error" not in row} == {1, "a"}
    assert (summary.answered, summary.errors) == (2, 2)


def test_latency_targets_reach_the_engine_with_every_sample(engine, answer, monkeypatch):
    targets, queue = [], engine.queue

    def note(prepared, so_far):
        samples = queue(prepared, so_far)
        asked = [request.options for request in samples]
        targets.extend((options.ttft_slo_s, options.tpot_slo_s, options.drop_when_late) for options in asked)
        return samples

    monkeypatch.setattr(engine, "queue", note)
    aimed = {"ttft_slo_s": 1.5, "tpot_slo_s": 1, "drop_when_late": True}
    answer([{"prompt": "a", "n": 2, **aimed}, {"prompt": "b", "ttft_slo_s": None}])
    assert targets == [(1.5, 1, True), (1.5, 1, True), (None, None, False)]


def test_a_row_that_is_dropped_as_late_is_answered_so(engine, answer):
    """Each row's clock starts as it joins the queue; a first token within a nanosecond cannot be."""
    late = {"ttft_slo_s": 1e-9, "drop_when_late": True}
    answers, summary = answer([{"id": "late", "prompt": "a", "n": 2, **late}, {"id": "kept", "prompt": "a"}])
    by_id = {row["id"]: row for row in answers}
    assert [s["finish_reason"] for s in by_id["late"]["samples"]] == ["late", "late"]
    assert by_id["late"]["output_tokens"] == 0
    assert by_id["kept"]["finish_reason"] == "length"
    assert (summary.answered, summary.errors, summary.late) == (2, 0, 1)
    assert str(summary.table().title).startswith("2 answered (1 of them late), 0 errors, in ")
    answers, summary = answer([{"id": "late alone", "prompt": "a", **late}])
    assert answers[-1]["finish_reason"] == "late"
    assert not engine.has_unfinished


def test_a_row_whose_deadline_passes_is_answered_with_what_it_has(engine, answer, monkeypatch):
    now = iter(range(10_000))
    monkeypatch.setattr(engine, "clock", lambda: float(next(now)))
    rows = [{"id": "late", "prompt": "abc", "deadline_s": 40, "max_tokens": 100}, {"id": "kept", "prompt": "abc"}]
    body = {"prompt": "abc", "deadline_s": 40, "max_tokens": 100, "ignore_eos": True}
    rows.append({"custom_id": "openai", "method": "POST", "url": "/v1/completions", "body": body})
    answers, summary = answer(rows)
    by_id = {row.get("custom_id") or row["id"]: row for row in answers}
    late, whole = by_id["late"], alone(engine, "abc", "int4", max_tokens=100)
    assert late["finish_reason"] == "late"
    assert 0 < late["output_tokens"] < 100
    assert late["text"] == whole[: late["output_tokens"]]
    assert sum(late["kv_tokens"].values()) == late["prompt_tokens"] + late["output_tokens"] - 1
    assert by_id["kept"]["finish_reason"] == "length"
    assert by_id["openai"]["error"]["code"] == "late"
    assert summary.late == 2


def test_dropping_without_a_target_is_refused_and_disturbs_nobody(answer):
    answers, summary = answer([{"prompt": "a", "drop_when_late": True}, {"prompt": "a"}])
    assert (summary.answered, summary.errors) == (1, 1)
    [error] = [row["error"] for row in answers if "error" in row]
    assert error == "drop_when_late without a ttft_slo_s drops nothing; give ttft_slo_s, in seconds"


def test_statistics_are_taken_once_a_step(engine, answer, monkeypatch):
    taken, steps, stats = [], [], engine.stats
    monkeypatch.setattr(engine, "stats", lambda: taken.append(stats()) or taken[-1])
    _, summary = answer([{"prompt": "abc"}, {"prompt": "de"}], on_step=lambda _: steps.append(1))
    assert len(taken) == len(steps) + 1
    assert taken[-1].num_output_tokens - taken[0].num_output_tokens == summary.output_tokens


def test_several_samples_come_together(engine, answer):
    row = {"prompt": "abc", "n": 3, "temperature": 1.0, "seed": 5, "max_tokens": 8, "ignore_eos": True}
    (several,), summary = answer([row])
    singles, _ = answer([row | {"n": 1, "seed": 5 + i} for i in range(3)])
    texts = {row["id"]: row["text"] for row in singles}
    assert [sample["text"] for sample in several["samples"]] == [texts[1], texts[2], texts[3]]
    assert len(set(texts.values())) > 1
    assert several["output_tokens"] == summary.output_tokens == 24
    fields = {"id", "samples", "prompt_tokens", "output_tokens", "kv_precision", "kv_tokens", "timing"}
    assert set(several) == fields


def test_log_probabilities_come_with_the_tokens_they_are_of(answer):
    (row,), _ = answer([{"prompt": "abc", "logprobs": 2}])
    tokenizer = tiny_tokenizer()
    assert len(row["logprobs"]) == row["output_tokens"] == 6
    assert tokenizer.decode([entry["token"] for entry in row["logprobs"]]) == row["text"]
    for entry in row["logprobs"]:
        assert entry["top"][0] == {key: entry[key] for key in ("token", "text", "bytes", "logprob")}  # greedy
        assert entry["bytes"] == list(tokenizer.token_bytes(entry["token"]))
        assert entry["text"] == tokenizer.decode([entry["token"]], skip_special_tokens=False)
        assert entry["top"][1]["logprob"] <= entry["logprob"] < 0
    (row,), _ = answer([{"prompt": "abc", "logprobs": 0}])
    assert all(set(entry) == {"token", "text", "bytes", "logprob"} for entry in row["logprobs"])


def test_sampled_answers_depend_on_line_and_seed_but_not_on_what_was_resumed(answer, tmp_path):
    rows = [{"prompt": "abc"} for _ in range(6)]
    sampling = {"temperature": 1.0, "max_tokens": 8, "ignore_eos": True}
    whole = by_id(without_timing(answer(rows, sampling)[0]))
    assert len({row["text"] for row in whole.values()}) > 1
    path = tmp_path / "answers.jsonl"
    journal_path(path).unlink()
    path.write_text("".join(json.dumps(whole[i]) + "\n" for i in (2, 3)) + '{"id": 1, "te')
    resumed, summary = answer(rows, sampling, resume=True)
    assert by_id(without_timing(resumed)) == whole
    assert (summary.answered, summary.skipped) == (4, 2)


def test_resuming_reports_an_error_once(answer):
    rows = [{"prompt": "abc"}, {"id": "bad"}]
    first, _ = answer(rows)
    again, summary = answer(rows, resume=True)
    assert again == first
    assert (summary.answered, summary.errors, summary.skipped, summary.skipped_errors) == (0, 0, 2, 1)


def test_rows_are_read_only_as_far_ahead_as_the_engine_needs(engine, tmp_path):
    read, ahead = 0, []

    def lines():
        nonlocal read
        for _ in range(120):
            read += 1
            yield b'{"prompt": "ab", "max_tokens": 2}'

    look = OnStep(lambda summary: ahead.append(read - summary.rows))
    assert run_job(engine, lines(), tmp_path / "answers.jsonl", GREEDY, observers=[look]).answered == read == 120
    assert max(ahead) <= 16 * 4 + 4 * 4 + 4 + 1  # planned, waiting, running, and one in hand


def test_an_answer_is_there_while_others_are_still_computed(answer, tmp_path):
    seen = []

    def look(summary):
        seen.append(len((tmp_path / "answers.jsonl").read_text().splitlines()))

    answer([{"prompt": "a", "max_tokens": 2}, {"prompt": "b", "max_tokens": 20}], on_step=look)
    assert 1 in seen[:-1]


def test_ctrl_c_leaves_the_complete_rows_and_an_idle_engine(answer, engine):
    def interrupt(summary):
        if summary.answered:
            raise KeyboardInterrupt

    rows = [{"prompt": "a", "max_tokens": 2 + 10 * i} for i in range(8)]
    answers, summary = answer(rows, on_step=interrupt)
    assert summary.interrupted
    assert [row["id"] for row in answers] == [1]
    assert not engine.has_unfinished
    assert engine.detokenizers == {}
    resumed, summary = answer(rows, resume=True)
    assert by_id(resumed).keys() == set(range(1, 9))
    assert (summary.answered, summary.skipped, summary.interrupted) == (7, 1, False)


def test_no_rows_are_no_work(answer):
    answers, summary = answer([b"", b"  "])
    assert answers == []
    assert (summary.rows, summary.output_tokens, summary.decode_tokens_per_s) == (0, 0, 0.0)
