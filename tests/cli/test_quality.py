"""What KV formats cost: figures against their definitions, and intervals."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import OPTIONS

from fineserve_jax import ConfigError, Engine, EngineConfig, RequestError, RequestOptions, SamplingParams
from fineserve_jax.engine import answers, estimates, quality
from fineserve_jax.engine.answers import (
    LAST_NUMBER,
    RECALL_RULE,
    found_answer,
    measure_answers,
    read_questions,
    recall_questions,
)
from fineserve_jax.engine.estimates import Estimate, estimate
from fineserve_jax.engine.perplexity import check_windows, measure_perplexity, score_window
from fineserve_jax.engine.quality import FormatQuality, Quality, measure_quality
from fineserve_jax.entrypoints.cli.quality import print_quality
from fineserve_jax.loaders import load_model
from fineserve_jax.runner import scoring
from fineserve_jax.runner.comparison import compare

TOKENS = np.random.default_rng(0).integers(3, 96, 240).tolist()
NAMES = ("int8", "int4")


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(estimates, "RESAMPLES", 100)
        yield


@pytest.fixture(scope="module")
def engine(tiny_model):
    config = {**OPTIONS, "kv_precision": "fp32", "kv_formats": ("fp32", *NAMES)}
    engine = Engine(load_model(tiny_model, "fp32"), EngineConfig(**config))
    engine.runner.use_formats(engine.config.served_formats)
    return engine


@pytest.fixture(scope="module")
def found(engine):
    return measure_quality(engine, TOKENS, NAMES, window=32, windows=3, new_tokens=6)


def log_softmax(logits):
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@pytest.mark.parametrize("count", [1, 8, 21])
def test_divergences_are_those_of_the_definition(engine, monkeypatch, count):
    """However positions fall into tiles."""
    monkeypatch.setattr(scoring, "MOST_LOGITS", 8 * 96)
    model, params = engine.runner.model, engine.runner.params
    rng = np.random.default_rng(count)
    first, noise = rng.standard_normal((2, count, model.config.hidden_size)).astype(np.float32)
    targets = rng.integers(0, 96, count).astype(np.int32)
    found = compare(model, params, first, first + 0.3 * noise, targets)
    logits = [model.apply({"params": params}, jnp.asarray(x), method="head") for x in (first, first + 0.3 * noise)]
    p, q = (log_softmax(np.asarray(part)) for part in logits)
    np.testing.assert_allclose(found.kl, (np.exp(p) * (p - q)).sum(-1), atol=1e-5)
    assert found.same_top.tolist() == (p.argmax(-1) == q.argmax(-1)).tolist()
    np.testing.assert_allclose(found.logprobs, [row[np.arange(count), targets] for row in (p, q)], atol=1e-4)
    assert scoring.most_slots(96) == 8


def test_what_the_last_layer_gave_is_kept_for_the_tokens_that_are_scored(engine):
    precision = check_windows(engine, engine.served(), TOKENS, 48, 1, "int4")
    scores = score_window(engine, engine.served(), TOKENS[:48], precision, keep_hidden=True).scores
    hidden = np.concatenate(scores.hidden)
    of_itself = compare(engine.runner.model, engine.runner.params, hidden, hidden, np.array(TOKENS[1:48], np.int32))
    np.testing.assert_allclose(of_itself.logprobs[0], [entry.logprob for entry in scores.entries], atol=1e-5)
    assert np.abs(of_itself.kl).max() < 1e-6
    assert of_itself.same_top.all()


def test_perplexities_are_those_that_are_measured_by_themselves(engine, found):
    for name, own in [("fp32", found.wide_perplexity), *((f.kv_precision, f.perplexity) for f in found.formats)]:
        assert own.value == pytest.approx(measure_perplexity(engine, TOKENS, 32, 3, name).ppl, rel=1e-5)
    for row in found.formats:
        assert row.rise.value == pytest.approx(row.perplexity.value / found.wide_perplexity.value - 1, abs=1e-6)


def test_narrower_formats_are_further_away(found):
    int4, int8 = found.formats
    assert (int4.kv_precision, int8.kv_precision) == ("int4", "int8")
    assert int4.bits_per_value < int8.bits_per_value
    assert 0 < int8.kl.value < int4.kl.value < int4.kl_p99.value
    assert 0 <= min(int4.same_greedy.low, int8.same_greedy.low) <= int8.same_greedy.high <= found.new_tokens == 6
    for row in found.formats:
        for name in ("perplexity", "rise", "kl", "kl_p99", "same_top", "same_greedy"):
            estimate = getattr(row, name)
            assert estimate.low <= estimate.value <= estimate.high or name == "kl_p99"


def test_tokens_are_counted_up_to_the_first_that_differs(engine, found, monkeypatch):
    answers = [[1, 2, 3, 4], [1, 2, 9, 4], [1, 2, 3, 4]]  # in fp32, then the narrowest first
    monkeypatch.setattr(quality, "_greedy_answers", lambda *arguments: answers)
    rows = measure_quality(engine, TOKENS, NAMES, window=48, windows=2, new_tokens=4).formats
    assert [row.same_greedy for row in rows] == [Estimate(2, 2, 2), Estimate(4, 4, 4)]


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), count=st.integers(30, 60))
def test_intervals_are_as_wide_as_the_mean_is_uncertain(seed, count):
    """1.96 standard errors to each side, where windows are many and alike."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count).astype(np.float32)
    draws = rng.integers(count, size=(2000, count))
    found = estimate(draws, lambda own: float(np.mean(own)), values)
    half = 1.96 * values.std() / np.sqrt(count)
    assert found.value == pytest.approx(values.mean(), abs=1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)


def test_the_format_to_take_is_the_narrowest_that_surely_loses_little_enough():
    def row(name, low, high):
        at = Estimate(0.0, 0.0, 0.0)
        return FormatQuality("fp32", name, 4.0, 1.0, at, Estimate((low + high) / 2, low, high), at, at, at, at)

    rows = (row("int4", 0.001, 0.006), row("int8", -0.001, 0.002), row("bf16", -0.0001, 0.0001))
    found = Quality("m", "fp32", "fp32", Estimate(1, 1, 1), 16, 8, 2, 1, rows)
    choices = {limit: found.choice(limit) for limit in (0.01, 0.005, 0.001, 0.0)}
    assert [None if c is None else c.kv_precision for c in choices.values()] == ["int4", "int8", "bf16", None]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"windows": 1}, "windows=1: at least 2 are needed"),
        ({"windows": 6}, "the text has 240 tokens, which is 5 windows of 48; 6 were asked for"),
        ({"kv_precisions": ["auto"]}, "kv_precision='auto' depends on how short memory is"),
        ({"kv_precisions": ["fp32"]}, "give formats besides fp32"),
        ({"kv_precisions": ["int5"]}, "int5"),
        ({"new_tokens": 0}, "new_tokens=0 behind half a window"),
        ({"new_tokens": 105}, "new_tokens=105 behind half a window"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine, options, error):
    wanted = {"kv_precisions": NAMES, "window": 48, "windows": 2, "new_tokens": 8} | options
    with pytest.raises((RequestError, ConfigError), match=error):
        measure_quality(engine, TOKENS, **wanted)


# -- other weights -----------------------------------------------------------------------------------------


def test_other_weights_are_measured_in_the_wide_format_with_their_own_head(engine, tiny_model):
    """Perplexity as an engine with these weights has it by itself."""
    config = EngineConfig(**{**OPTIONS, "weights": "bf16", "kv_precision": "fp32", "kv_formats": ("fp32",)})
    other = Engine(load_model(tiny_model, "bf16"), config)
    found = measure_quality(engine, TOKENS, NAMES, window=32, windows=2, new_tokens=4, others=[other])
    (row,) = found.other_weights
    assert (row.weights, row.kv_precision, row.bits_per_value) == ("bf16", "fp32", 32.0)
    assert row.perplexity.value == pytest.approx(measure_perplexity(other, TOKENS, 32, 2, "fp32").ppl, rel=1e-5)
    assert 0 < row.kl.value < 0.1
    assert found.choice(1e9) in found.formats


def test_bytes_of_a_token_are_those_of_its_share_of_a_page(engine, found):
    geometry = engine.runner.geometry
    values = 2 * geometry.num_layers * geometry.kv_heads * geometry.head_dim
    for row in found.formats:
        assert row.kv_bytes_per_token == pytest.approx(row.bits_per_value * values / 8)


# -- questions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rule", "expected"),
    [
        ("48 / 2 = 24 clips in May.\n#### 1,072", LAST_NUMBER, "1072"),
        ("It costs 3.50 dollars, or -2", LAST_NUMBER, "-2"),
        ("5.0", LAST_NUMBER, "5"),
        ("none", LAST_NUMBER, None),
        ("A, no: B", "([A-D])", "B"),
        (" 48213. The number of the safe is 7", RECALL_RULE, "48213"),
    ],
)
def test_an_answer_is_what_the_rule_last_finds(text, rule, expected):
    assert found_answer(text, rule) == expected


def test_questions_are_read_in_the_form_of_gsm8k(engine, tmp_path):
    tokenizer = engine.served().model.tokenizer
    rows = [{"question": "how many", "answer": "6 + 1 = 7\n#### 7", "more": 1}, {"question": "b", "answer": 12}]
    (tmp_path / "task.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    found = read_questions(tmp_path / "task.jsonl", tokenizer, "Q: {question} {x}\nA:", LAST_NUMBER, 10)
    assert [question.answer for question in found] == ["7", "12"]
    assert found[0].prompt == tuple(tokenizer.encode("Q: how many {x}\nA:"))


@pytest.mark.parametrize(
    ("content", "rule", "error"),
    [
        ('{"question": "a"}\n', LAST_NUMBER, "line 1: Field required"),
        ("[1]\n", LAST_NUMBER, "line 1"),
        ('{"question": "a", "answer": "1"}', LAST_NUMBER, "has 1 questions; at least 2"),
        ("", "(a)(b)", "has 2 groups; give it one"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(engine, tmp_path, content, rule, error):
    (tmp_path / "task.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=error):
        read_questions(tmp_path / "task.jsonl", engine.served().model.tokenizer, "{question}", rule, 10)


def test_a_number_is_told_as_far_back_as_asked(engine):
    tokenizer = engine.served().model.tokenizer
    questions = recall_questions(tokenizer, TOKENS, distance=100, count=2)
    for i, question in enumerate(questions):
        text = list(question.prompt)
        told = tokenizer.encode(f"The number of the safe is {question.answer}.", add_special_tokens=False)[:-1]
        start = next(at for at in range(len(text)) if text[at : at + 100] == TOKENS[100 * i : 100 * i + 100])
        assert any(text[at : at + len(told)] == told for at in range(start))
    assert questions[0].answer != questions[1].answer
    with pytest.raises(RequestError, match="3 questions 100 tokens back need 300"):
        recall_questions(tokenizer, TOKENS, distance=100, count=3)


def test_shares_of_right_and_of_equal_answers_are_counted(engine, monkeypatch):
    texts = {"fp32": ["7", "8", "no", "9"], "int8": ["7", "8", "no", "1"], "int4": ["7", "2", "3", "x"]}
    monkeypatch.setattr(answers, "_greedy_texts", lambda engine, tokenizer, questions, name, new: texts[name])
    questions = [answers.Question((1,), right) for right in ("7", "8", "9", "9")]
    rows = measure_answers(engine, None, questions, NAMES, "fp32", 4, LAST_NUMBER)
    assert [(r.kv_precision, r.right.value, r.same.value) for r in rows] == [
        ("fp32", 0.75, 1.0),
        ("int8", 0.5, 0.75),
        ("int4", 0.25, 0.25),
    ]


def test_questions_are_answered_as_requests_are(engine):
    tokenizer = engine.served().model.tokenizer
    questions = [answers.Question(tuple(TOKENS[i : i + 20]), "1") for i in range(6)]
    found = answers._greedy_texts(engine, tokenizer, questions, "int8", 5)
    sampling = SamplingParams(max_tokens=5, temperature=0.0)
    for question, text in zip(questions, found, strict=True):
        request = engine.add_request(question.prompt, sampling, RequestOptions(kv_precision="int8"))
        while engine.has_unfinished:
            engine.step()
        assert text == tokenizer.decode(request.output_token_ids)
        engine.release(request)


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_json(run, tmp_path, tiny_model):
    (tmp_path / "text.txt").write_text("what a format costs is told by a text " * 8)
    # Sizes as of the engine above, so that its programs are used.
    words = ["quality", "--text", tmp_path / "text.txt", "--window", "128", "--windows", "2", "--new-tokens", "6"]
    words += ["--kv-precision", "int8", "--kv-precision", "int4", "--model", tiny_model, "--weights", "fp32"]
    words += ["--kv-memory", "8MiB", "--max-chunk-tokens", "32"]
    (tmp_path / "task.jsonl").write_text('{"question": "a", "answer": "1"}\n' * 3)
    words += ["--task", tmp_path / "task.jsonl", "--task-tokens", "4", "--plot", tmp_path / "plot.svg"]
    words += ["--pressure", "1.5"]
    status, written, _ = run(*words, "--json", "--max-loss", "1000")
    assert status == 0
    found = json.loads(written)
    assert [row["kv_precision"] for row in found["formats"]] == ["int4", "int8"]
    assert set(found["formats"][0]["kl"]) == {"value", "low", "high"}
    assert (found["max_loss"], found["choice"], found["windows"]) == (10.0, "int4", 2)
    assert {field.name for field in dataclasses.fields(Quality)} < set(found)
    assert [row["kv_precision"] for row in found["answers"]["task"]] == ["fp32", "int8", "int4", "auto"]
    assert [row["pressure"] for row in found["under_pressure"]] == [1.5]
    assert all(name in (tmp_path / "plot.svg").read_text() for name in ("int4", "auto / 1.5"))


def test_the_table_says_what_was_measured_and_which_format_to_take(found, capsys):
    print_quality(found, 1000.0)
    table = capsys.readouterr().out
    assert "3 windows of 32 tokens" in table
    assert [word for word in ("int8", "int4", "same top, %") if word not in table] == []
    assert "for a rise of perplexity of at most 1000 %, take int4: 5.50 bits a value" in table
    print_quality(found, -100.0)
    assert "take fp32, or measure more windows" in capsys.readouterr().out


def test_what_the_format_to_take_needs_is_said(found, capsys):
    (int4, *_) = found.formats
    pair = dataclasses.replace(int4, kv_precision="k8v4")
    print_quality(dataclasses.replace(found, formats=(pair,), page_size=32), 1000.0)
    assert "take k8v4: 5.50 bits a value, served with k8v4 in kv_formats and page_size=32" in capsys.readouterr().out
