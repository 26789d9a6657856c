"""Perplexity against the whole model evaluated at once, without a cache."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from model_oracle import flax_logits
from tiny_model import OPTIONS, with_nan

from fineserve_jax import ConfigError, Engine, EngineConfig, NonFiniteError, RequestError
from fineserve_jax.engine.perplexity import measure_perplexity, read_text
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.loaders import load_model
from fineserve_jax.models import build_model
from fineserve_jax.pallas_kernels.formats import get_format

TOKENS = np.random.default_rng(0).integers(3, 96, 100).tolist()


@pytest.fixture(scope="module")
def engine(tiny_model):
    config = EngineConfig(**{**OPTIONS, "max_batch_size": 1, "kv_precision": "fp32"})
    return Engine(load_model(tiny_model, "fp32"), config)


def expected_logprobs(engine, tokens):
    """log p(token | those before it) of all tokens but the first."""
    logits = flax_logits(build_model(engine.model.config, "fp32"), engine.model.params, np.array(tokens))
    logprobs = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    return logprobs[np.arange(len(tokens) - 1), tokens[1:]]


# Windows of one chunk, of several, and with one token left over (32 + 1), which is no chunk.
@pytest.mark.parametrize(("window", "windows"), [(2, 5), (33, 3), (40, 2)])
def test_perplexity_is_that_of_the_whole_window_at_once(engine, window, windows):
    result = measure_perplexity(engine, TOKENS, window, windows)
    parts = [TOKENS[i * window : (i + 1) * window] for i in range(windows)]
    logprobs = np.concatenate([expected_logprobs(engine, part) for part in parts])
    assert result.tokens == logprobs.size == windows * (window - 1)
    assert result.ppl == pytest.approx(math.exp(-logprobs.mean(dtype=np.float64)), rel=1e-5)


def test_a_result_names_what_was_measured(engine):
    seen = []
    result = measure_perplexity(engine, TOKENS, 16, 3, on_window=lambda i, ppl: seen.append((i, ppl)))
    assert [i for i, _ in seen] == [1, 2, 3]
    assert seen[-1][1] == result.ppl
    assert (result.kv_precision, result.weights, result.model) == ("fp32", "fp32", engine.model.name)
    assert result.bits_per_value == get_format("fp32").bits_per_value(engine.runner.geometry) == 32.0


def test_nothing_stays_in_the_cache(engine):
    measure_perplexity(engine, TOKENS, 40, 2)
    assert not engine.kv.requests
    check_integrity(engine.kv)
    usage = measure_usage(engine.kv)
    assert usage.reserved_bytes == usage.needed_bytes == 0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            {"window": 33, "windows": 4},
            r"the text has 100 tokens, which is 3 windows of 33; 4 were asked for",
        ),
        ({"window": 1}, "at least 2 tokens"),
        ({"windows": 0}, "1 window"),
        ({"window": 129, "windows": 0}, "1 window"),
        ({"window": 16, "windows": 1, "kv_precision": "int3"}, "kv_precision='int3' is not served"),
    ],
)
def test_impossible_wishes_are_refused(engine, options, error):
    with pytest.raises(RequestError, match=error):
        measure_perplexity(engine, TOKENS, **options)


@pytest.mark.parametrize("check_finite", [False, True])
def test_scores_that_are_not_finite_are_an_error(engine, check_finite):
    config = engine.config.model_copy(update={"check_finite": check_finite})
    first_in_second_window = next(token for token in TOKENS[32:64] if token not in TOKENS[:32])
    spoilt = Engine(with_nan(engine.model, first_in_second_window), config)
    measure_perplexity(spoilt, TOKENS, 32, 1)
    remedy = "the output of the embedding is the first such" if check_finite else "set check_finite"
    with pytest.raises(NonFiniteError, match=f"window 0: the logits of model 'tiny' are not finite .*; {remedy}"):
        measure_perplexity(spoilt, TOKENS, 64, 1)
    assert not spoilt.kv.requests


def test_a_target_that_cannot_be_is_an_error(engine):
    """Infinitely unlikely, though all hidden states are finite."""
    params = engine.model.params
    norm = {"scale": params["norm"]["scale"] * 1e30}
    spoilt = Engine(dataclasses.replace(engine.model, params={**params, "norm": norm}), engine.config)
    with pytest.raises(NonFiniteError, match="the perplexity of model 'tiny' over window 0 is inf"):
        measure_perplexity(spoilt, TOKENS, 32, 1)


def test_a_window_longer_than_the_engine_holds_is_refused(engine):
    with pytest.raises(RequestError, match=r"window=129 is more than max_seq_len=128"):
        measure_perplexity(engine, TOKENS * 2, 129, 1)


def test_tokens_outside_the_vocabulary_are_refused(engine):
    for position in (0, 14, 15, 31):
        tokens = [5] * 32
        tokens[position] = 96
        with pytest.raises(RequestError, match="prompt has token 96"):
            measure_perplexity(engine, tokens, 16, 2)


def test_texts_that_cannot_be_read_are_refused(tmp_path):
    (tmp_path / "latin1.txt").write_bytes(b"\xe4")
    (tmp_path / "text.txt").write_text("ä", encoding="utf-8")
    assert read_text(tmp_path / "text.txt", 2, 1) == "ä"
    for path, window, windows, error in [
        (tmp_path / "none.txt", 16, 1, r"cannot read the text .*none.txt: No such file"),
        (tmp_path, 16, 1, r"cannot read the text .*: Is a directory"),
        (tmp_path / "latin1.txt", 16, 1, "is not UTF-8"),
        (tmp_path / "text.txt", 1, 1, "window=1"),
        (tmp_path / "text.txt", 2, 0, "windows=0"),
    ]:
        with pytest.raises(ConfigError, match=error):
            read_text(path, window, windows)
