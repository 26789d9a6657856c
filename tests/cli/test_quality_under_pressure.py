"""What `auto` costs when memory is short: requests are within their share, and no narrower than that takes."""

import numpy as np
import pytest
from tiny_model import OPTIONS

from fineserve_jax import ConfigError, Engine, EngineConfig, RequestError
from fineserve_jax.engine import answers, estimates
from fineserve_jax.engine.answers import LAST_NUMBER, measure_answers
from fineserve_jax.engine.perplexity import check_windows, score_window
from fineserve_jax.engine.pressure import EngineUnderPressure
from fineserve_jax.engine.quality import measure_quality
from fineserve_jax.loaders import load_model
from fineserve_jax.pallas_kernels.formats import get_format

TOKENS = np.random.default_rng(0).integers(3, 96, 256).tolist()
CONFIG = EngineConfig(
    **{**OPTIONS, "max_chunk_tokens": 16, "kv_precision": "fp32", "kv_formats": ("fp32", "bf16", "int8", "int4")}
)
WINDOW, PRESSURE = 120, 1.5


@pytest.fixture(scope="module")
def model(tiny_model):
    return load_model(tiny_model, "fp32")


@pytest.fixture(scope="module")
def short(model):
    return EngineUnderPressure(model, CONFIG, PRESSURE)


def kept_after_steps(engine, monkeypatch):
    """How many tokens of a window are computed after each step that does not end it, and in which format."""
    seen = []
    step = type(engine).step

    def spied(self):
        advanced = step(self)
        seen.extend(self.kv.tokens_by_format(request) for request in self.kv.requests)
        return advanced

    monkeypatch.setattr(type(engine), "step", spied)
    precision = check_windows(engine, engine.served(), TOKENS, WINDOW, 1, "auto")
    end = score_window(engine, engine.served(), TOKENS[:WINDOW], precision).kv_tokens
    return seen, end


def test_a_request_is_narrowed_to_its_share_and_no_further(short, monkeypatch):
    """Bits of all tokens so far and of a page more, against a share of what all tokens would take in bf16; what was
    narrowed last, a page, was needed for it. The newest two pages stay as they are."""
    seen, end = kept_after_steps(short, monkeypatch)
    bits = {name: get_format(name).page_units(short.runner.geometry) for name in ("bf16", "int8", "int4")}
    share = 8 * bits["bf16"] / PRESSURE
    assert [sum(kept.values()) for kept in seen] == [16, 32, 48, 64, 80, 96, 112]
    for before, kept in zip([{}, *seen], seen, strict=False):
        held = bits["bf16"] + sum(bits[name] * count // 16 for name, count in kept.items())
        assert held <= share
        assert kept["bf16"] >= min(32, sum(kept.values()))
        if {**kept, "bf16": 0} != {**before, "bf16": 0}:
            coarsest = bits["bf16"] - bits["int8"] if "int4" not in kept else bits["int8"] - bits["int4"]
            assert held + coarsest > share
    assert list(seen[-1]) == ["int4", "int8", "bf16"] or list(seen[-1]) == ["int8", "bf16"]
    assert sum(end.values()) == WINDOW


@pytest.mark.slow  # compiles for a mixture of formats
def test_auto_costs_more_than_bf16_and_is_as_wide_as_its_share(model, short, monkeypatch):
    monkeypatch.setattr(estimates, "RESAMPLES", 100)
    found = measure_quality(Engine(model, CONFIG), TOKENS, ("bf16", "int4"), WINDOW, 2, 2, under_pressure=[short])
    (row,) = found.under_pressure
    by_name = {other.kv_precision: other for other in found.formats}
    assert (row.kv_precision, row.pressure, row.weights) == ("auto", PRESSURE, "fp32")
    assert by_name["int4"].bits_per_value < row.bits_per_value <= by_name["bf16"].bits_per_value / PRESSURE + 0.5
    assert by_name["bf16"].kl.value < row.kl.value < 2 * by_name["int4"].kl.value
    assert row not in found.formats
    assert found.choice(1e9) in found.formats


def test_shorter_memory_costs_more(model, short):
    """Tokens whose past was not narrowed yet are scored as in bf16."""
    mild = EngineUnderPressure(model, CONFIG, 1.05)
    of_each = []
    for engine in (Engine(model, CONFIG), mild, short):
        name = "auto" if engine in (mild, short) else "bf16"
        precision = check_windows(engine, engine.served(), TOKENS, WINDOW, 1, name)
        entries = score_window(engine, engine.served(), TOKENS[:WINDOW], precision).scores.entries
        of_each.append(np.array([entry.logprob for entry in entries]))
    wide, *narrowed = of_each
    first_changed = [np.flatnonzero(np.abs(scores - wide) > 1e-5).min() for scores in narrowed]
    assert first_changed[0] == 112  # the first token of the last page
    assert first_changed[1] == 80  # 5.3 pages in bf16 are a share


@pytest.mark.parametrize(
    ("pressure", "window", "error"),
    [
        (3, WINDOW, "pressure=3 is more than 120 tokens bear, 1.6"),
        (1.5, 40, "pressure=1.5 is more than 40 tokens bear, 1, since the newest 2 full pages"),
    ],
)
def test_a_pressure_that_cannot_be_met_is_refused(model, pressure, window, error):
    short = EngineUnderPressure(model, CONFIG, pressure)
    with pytest.raises(RequestError, match=error):
        measure_quality(Engine(model, CONFIG), TOKENS, ["int8"], window, 2, 6, under_pressure=[short])


@pytest.mark.parametrize("pressure", [1.0, 0.5, float("inf"), float("nan")])
def test_no_pressure_is_refused(model, pressure):
    with pytest.raises(ConfigError, match=f"pressure={pressure:g}: requests that want no more memory"):
        EngineUnderPressure(model, CONFIG, pressure)


def test_auto_starts_in_bf16_or_is_not_measured(model):
    short = EngineUnderPressure(model, CONFIG.model_copy(update={"kv_memory": 40_000}), PRESSURE)
    precision = check_windows(short, short.served(), TOKENS, WINDOW, 1, "auto")
    assert precision.start != "bf16"
    with pytest.raises(RequestError, match="120 tokens in bf16 do not fit the KV memory"):
        short.check_share(precision, WINDOW)


def test_questions_are_asked_under_pressure_too(model, short, monkeypatch):
    texts = {"fp32": ["7", "8"], "auto": ["7", "9"]}
    monkeypatch.setattr(answers, "_greedy_texts", lambda engine, tokenizer, questions, name, new: texts[name])
    questions = [answers.Question((1,), right) for right in ("7", "8")]
    rows = measure_answers(Engine(model, CONFIG), None, questions, (), "fp32", 4, LAST_NUMBER, [short])
    assert [(r.kv_precision, r.pressure, r.right.value) for r in rows] == [("fp32", None, 1.0), ("auto", PRESSURE, 0.5)]
