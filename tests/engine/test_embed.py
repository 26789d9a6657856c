"""`LLM.embed`: vectors are pooled hidden states of the whole model at once, however a prompt is computed."""

import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import check_nothing_is_left, with_nan
from model_oracle import causal_attend

from fineserve_jax.errors import RequestError
from fineserve_jax.models import build_model

ERROR = 1e-4  # of hidden states of about 1, between sums in two orders
RNG = np.random.default_rng(0)
PROMPTS = [RNG.integers(1, 96, length).tolist() for length in (1, 16, 17, 70, 256)]


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(kv_precision="fp32")


@pytest.fixture(scope="module")
def hidden(tiny_model):
    """f32[tokens, hidden] of each of `PROMPTS`."""
    model, padded = build_model(tiny_model.config, "fp32"), np.zeros((len(PROMPTS), 256), np.int32)
    for row, prompt in zip(padded, PROMPTS, strict=True):  # one length, so one program
        row[: len(prompt)] = prompt
    positions = jnp.arange(256, dtype=jnp.int32)
    attend = causal_attend(tiny_model.config, positions)
    states = [model.apply({"params": tiny_model.params}, jnp.asarray(row), positions, attend) for row in padded]
    return [np.asarray(own)[: len(prompt)] for own, prompt in zip(states, PROMPTS, strict=True)]


def expected(states: np.ndarray, pooling: str) -> np.ndarray:
    return states.mean(axis=0, dtype=np.float64) if pooling == "mean" else states[-1]


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_pooled_hidden_states_whatever_is_cached(llm, hidden, pooling):
    llm.score(PROMPTS[3], [[5]])  # its pages are cached
    for _ in range(2):
        for prompt, states, found in zip(PROMPTS, hidden, llm.embed(PROMPTS, pooling=pooling), strict=True):
            assert found.token_ids == prompt
            assert found.error is None
            assert found.vector.dtype == np.float32
            np.testing.assert_allclose(found.vector, expected(states, pooling), atol=ERROR)
    check_nothing_is_left(llm)


def test_the_vector_of_a_prompt_that_lost_its_pages_is_the_same(make_llm, hidden, monkeypatch):
    """It is computed again from its beginning, and each token counts once."""
    scheduler = (llm := make_llm(kv_precision="fp32", prefix_cache="off")).engine.scheduler
    schedule, computed = scheduler.schedule, []

    def restarting(now):
        for request in list(llm.engine.detokenizers):
            if request.num_computed_tokens and len(computed) < 3:
                computed.append(request.num_computed_tokens)
                scheduler.restart(request)
        return schedule(now)

    monkeypatch.setattr(scheduler, "schedule", restarting)
    (found,) = llm.embed([PROMPTS[4]], pooling="mean")
    assert computed == [64] * 3
    np.testing.assert_allclose(found.vector, expected(hidden[4], "mean"), atol=ERROR)


def test_vectors_may_be_normalised_and_prompts_have_options(llm, hidden):
    wide, narrow = llm.embed([PROMPTS[3]] * 2, pooling="mean", normalize=True, kv_precision=["fp32", "int8"])
    states = expected(hidden[3], "mean")
    np.testing.assert_allclose(wide.vector, states / np.linalg.norm(states), atol=ERROR)
    assert np.linalg.norm(narrow.vector) == pytest.approx(1, abs=1e-6)
    assert 0 < np.abs(wide.vector - narrow.vector).max() < 0.1
    assert llm.embed([], pooling="last") == []


def test_what_cannot_be_computed_has_an_error_and_the_others_have_vectors(make_llm, tiny_model):
    spoilt = make_llm(with_nan(tiny_model, 7), kv_precision="fp32")
    good, bad = spoilt.embed([[5, 6, 8], [5, 7, 8]], pooling="mean")
    assert good.error is None
    assert np.isfinite(good.vector).all()
    assert bad.vector is None
    assert "not finite" in bad.error


@pytest.mark.parametrize(
    ("prompts", "pooling", "error"),
    [
        (["a"], "max", "pooling='max': choose one of mean, last"),
        (["a", ""], "mean", "prompt 1: the prompt is empty"),
        (["a", "b" * 257], "last", "prompt 1: the prompt has 257 tokens"),
    ],
)
def test_what_has_no_vector_is_named_before_anything_is_computed(llm, prompts, pooling, error):
    before = llm.stats().num_steps
    with pytest.raises(RequestError, match=error):
        llm.embed(prompts, pooling=pooling)
    assert llm.stats().num_steps == before
