"""What KV formats cost: figures against their definitions, and intervals."""

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_model import OPTIONS

from fineserve_jax import ConfigError, Engine, EngineConfig, RequestError
from fineserve_jax.engine import quality
from fineserve_jax.engine.perplexity import check_windows, measure_perplexity, score_window
from fineserve_jax.engine.quality import Estimate, FormatQuality, Quality, measure_quality
from fineserve_jax.entrypoints.cli.quality import print_quality
from fineserve_jax.loaders import load_model
from fineserve_jax.runner import scoring
from fineserve_jax.runner.comparison import Differences, compare

TOKENS = np.random.default_rng(0).integers(3, 96, 240).tolist()
NAMES = ("int8", "int4")


@pytest.fixture(scope="module", autouse=True)
def _few_resamples():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "RESAMPLES", 100)
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
    scores = score_window(engine, engine.served(), TOKENS[:48], precision, keep_hidden=True)
    hidden = np.concatenate(scores.hidden)
    of_itself = compare(engine.runner.model, engine.runner.params, hidden, hidden, np.array(TOKENS[1:48], np.int32))
    np.testing.assert_allclose(of_itself.logprobs[0], [entry.logprob for entry in scores.entries], atol=1e-5)
    assert np.abs(of_itself.kl).max() < 1e-6
    assert of_itself.same_top.all()


def test_perplexities_are_those_that_are_measured_by_themselves(engine, found):
    for name, estimate in [("fp32", found.wide_perplexity), *((f.kv_precision, f.perplexity) for f in found.formats)]:
        assert estimate.value == pytest.approx(measure_perplexity(engine, TOKENS, 32, 3, name).ppl, rel=1e-5)
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
    answers = {"fp32": [1, 2, 3, 4], "int8": [1, 2, 3, 4], "int4": [1, 2, 9, 4]}
    monkeypatch.setattr(quality, "_greedy_answers", lambda *arguments: answers)
    rows = measure_quality(engine, TOKENS, NAMES, window=48, windows=2, new_tokens=4).formats
    assert [row.same_greedy for row in rows] == [Estimate(2, 2, 2), Estimate(4, 4, 4)]


@settings(max_examples=10)
@given(seed=st.integers(0, 1000), count=st.integers(30, 60))
def test_intervals_are_as_wide_as_the_mean_is_uncertain(seed, count):
    """1.96 standard errors to each side, where windows are many and alike."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(count).astype(np.float32)
    windows = [quality._Window(Differences(v[None], v[None] > 0, np.zeros((2, 1))), 0) for v in values]
    draws = rng.integers(count, size=(2000, count))
    found = quality._estimate(draws, lambda own: float(np.mean([w.differences.kl for w in own])), windows)
    half = 1.96 * values.std() / np.sqrt(count)
    assert found.value == pytest.approx(values.mean(), abs=1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.15)


def test_the_format_to_take_is_the_narrowest_that_surely_loses_little_enough():
    def row(name, low, high):
        at = Estimate(0.0, 0.0, 0.0)
        return FormatQuality(name, 4.0, at, Estimate((low + high) / 2, low, high), at, at, at, at)

    rows = (row("int4", 0.001, 0.006), row("int8", -0.001, 0.002), row("bf16", -0.0001, 0.0001))
    found = Quality("m", "fp32", "fp32", Estimate(1, 1, 1), 8, 2, 1, rows)
    choices = {limit: found.choice(limit) for limit in (0.01, 0.005, 0.001, 0.0)}
    assert [None if c is None else c.kv_precision for c in choices.values()] == ["int4", "int8", "bf16", None]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"windows": 1}, "windows=1: at least 2 are needed"),
        ({"windows": 6}, "the text has 240 tokens, which is 5 windows of 48; 6 were asked for"),
        ({"kv_precisions": ["auto"]}, "kv_precision='auto' depends on what else is served"),
        ({"kv_precisions": ["fp32"]}, "give formats besides fp32"),
        ({"kv_precisions": ["int3"]}, "int3"),
        ({"new_tokens": 0}, "new_tokens=0 behind half a window"),
        ({"new_tokens": 105}, "new_tokens=105 behind half a window"),
    ],
)
def test_what_cannot_be_measured_is_refused(engine, options, error):
    wanted = {"kv_precisions": NAMES, "window": 48, "windows": 2, "new_tokens": 8} | options
    with pytest.raises((RequestError, ConfigError), match=error):
        measure_quality(engine, TOKENS, **wanted)


def test_the_command_writes_json(run, tmp_path, tiny_model):
    (tmp_path / "text.txt").write_text("what a format costs is told by a text " * 8)
    # Sizes as of the engine above, so that its programs are used.
    words = ["quality", "--text", tmp_path / "text.txt", "--window", "128", "--windows", "2", "--new-tokens", "6"]
    words += ["--kv-precision", "int8", "--kv-precision", "int4", "--model", tiny_model, "--weights", "fp32"]
    words += ["--kv-memory", "8MiB", "--max-chunk-tokens", "32"]
    status, written, _ = run(*words, "--json", "--max-loss", "1000")
    assert status == 0
    found = json.loads(written)
    assert [row["kv_precision"] for row in found["formats"]] == ["int4", "int8"]
    assert set(found["formats"][0]["kl"]) == {"value", "low", "high"}
    assert (found["max_loss"], found["choice"], found["windows"]) == (10.0, "int4", 2)
    assert {field.name for field in dataclasses.fields(Quality)} < set(found)


def test_the_table_says_what_was_measured_and_which_format_to_take(found, capsys):
    print_quality(found, 1000.0)
    table = capsys.readouterr().out
    assert "3 windows of 32 tokens" in table
    assert [word for word in ("int8", "int4", "same top, %") if word not in table] == []
    assert "for a rise of perplexity of at most 1000 %, take int4: 5.50 bits a value" in table
    print_quality(found, -100.0)
    assert "take fp32, or measure more windows" in capsys.readouterr().out
