"""Sampling equals its definition: the sets by sorting, the probabilities by float64, each row by itself."""

import math

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from sampler_cases import (
    decided_by_rounding,
    draw,
    frequencies,
    kept_tokens,
    log_softmax,
    make_request,
    normal_logits,
    softmax,
)

from fineserve_jax.errors import RequestError
from fineserve_jax.request.sampling_params import MAX_TOP_LOGPROBS, MIN_TEMPERATURE, SamplingParams

VOCAB = 16
SEEDS = st.integers(0, 2**32 - 1)
# The chi-square quantile at 1 - 1e-6 for 7 degrees of freedom; the seeds are fixed, so this cannot come and go.
CHI_SQUARE_7 = 40.5


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    return float(((counts - expected) ** 2 / expected).sum())


# -- what is not finite --------------------------------------------------------------------------------------

WAYS = [{}, {"logprobs": 2}, {"temperature": 1.0}, {"temperature": 0.5, "top_p": 0.5}, {"repetition_penalty": 1.5}]


@settings(max_examples=40)
@given(
    seed=SEEDS,
    fault=st.sampled_from([None, "nan", "inf", "-inf", "all -inf", "all nan"]),
    ways=st.lists(st.sampled_from(WAYS), min_size=3, max_size=3),
)
def test_just_the_rows_whose_logits_are_not_finite_are_told(seed, fault, ways):
    """A single minus infinity excludes a token and is none of that."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((3, VOCAB)).astype(np.float32)
    place = slice(None) if fault is not None and fault.startswith("all") else int(rng.integers(VOCAB))
    clean = draw(logits, [make_request(i, output=(1, 2), **way) for i, way in enumerate(ways)])
    if fault is not None:
        logits[1, place] = float(fault.removeprefix("all "))
    sampled = draw(logits, [make_request(i, output=(1, 2), **way) for i, way in enumerate(ways)])
    assert sampled.finite.tolist() == [True, fault in (None, "-inf"), True]
    for row in (0, 2):
        assert sampled.tokens[row] == clean.tokens[row]
        np.testing.assert_array_equal(sampled.top_logprobs[row], clean.top_logprobs[row])


def test_a_row_all_of_whose_tokens_are_banned_is_told():
    banned = make_request(min_tokens=5, stop_ids=frozenset(range(VOCAB)))
    assert draw(np.zeros(VOCAB), [banned, make_request()]).finite.tolist() == [False, True]


# -- greedy, and log-probabilities -------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_temperature_zero_takes_the_likeliest_token(seed, scale):
    logits = np.random.default_rng(seed).standard_normal((8, 50)).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(draw(logits, [make_request()] * 8).tokens, logits.argmax(-1))


@settings(max_examples=20)
@example(seed=151, scale=0.0625, temperature=0.0)  # two logits that differ, and log-probabilities that do not
@given(seed=SEEDS, scale=st.floats(0.01, 100), temperature=st.sampled_from([0.0, 0.7, 2.0]))
def test_log_probabilities_are_the_models_own(seed, scale, temperature):
    """Whatever the temperature, penalties and biases that the token was drawn with."""
    logits = np.random.default_rng(seed).standard_normal((8, 50)).astype(np.float32) * np.float32(scale)
    params = {"logprobs": 5, "temperature": temperature, "logit_bias": {3: 9.0}, "presence_penalty": 1.0}
    sampled = draw(logits, [make_request(i, prompt=(1,), output=(2, 3), **params) for i in range(8)])
    expected = log_softmax(logits)
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    chosen = np.take_along_axis(expected, sampled.tokens[:, None], axis=-1)[:, 0]
    np.testing.assert_allclose(sampled.logprobs, chosen, **tolerance)
    assert sampled.top_ids.shape == sampled.top_logprobs.shape == (8, MAX_TOP_LOGPROBS)
    np.testing.assert_array_equal(sampled.top_ids, np.argsort(-logits, axis=-1, kind="stable")[:, :20])
    np.testing.assert_allclose(
        sampled.top_logprobs, np.take_along_axis(expected, sampled.top_ids, axis=-1), **tolerance
    )


def test_a_small_vocabulary_has_fewer_top_log_probabilities():
    sampled = draw(normal_logits(0, 5), [make_request(logprobs=20)])
    np.testing.assert_allclose(np.exp(sampled.top_logprobs).sum(), 1.0, rtol=1e-5)
    assert sampled.top_ids.shape == (1, 5)


# -- the lowest temperature --------------------------------------------------------------------------------


@settings(max_examples=20)
@given(seed=SEEDS, scale=st.floats(0.01, 100))
def test_the_lowest_temperature_takes_the_likeliest_token_where_the_margin_is_clear(seed, scale):
    logits = np.random.default_rng(seed).standard_normal((8, 50)).astype(np.float32) * np.float32(scale)
    logits[4, 0] = logits[4].min()  # banned there
    ranked = np.sort(logits, axis=-1)
    # 60 times the temperature, and all rounding: a token so much less likely is drawn with probability e^-60.
    assume((ranked[:, -1] - ranked[:, -2] > 60 * MIN_TEMPERATURE + 1e-6 * np.abs(ranked[:, -1])).all())
    params = [{}, {"top_k": 5}, {"top_p": 0.9}, {"min_p": 0.1}, {"logit_bias": {0: -math.inf}}] * 2
    requests = [make_request(i, temperature=MIN_TEMPERATURE, **own) for i, own in enumerate(params[:8])]
    np.testing.assert_array_equal(draw(logits, requests).tokens, logits.argmax(-1))


def test_the_lowest_temperature_draws_near_ties_by_their_probabilities():
    logits = (normal_logits(5, 8) * MIN_TEMPERATURE).astype(np.float32)
    drawn = frequencies(logits, 4096, temperature=MIN_TEMPERATURE)
    probabilities = softmax(logits.astype(np.float64) / MIN_TEMPERATURE)
    assert chi_square(drawn, probabilities.ravel()) < CHI_SQUARE_7
    assert SamplingParams(temperature=np.float32(MIN_TEMPERATURE)).temperature > 0
    with pytest.raises(RequestError, match="a temperature under 1e-06 is as good as 0"):
        SamplingParams(temperature=0.9 * MIN_TEMPERATURE)


# -- which tokens may be drawn -----------------------------------------------------------------------------


@settings(max_examples=40, derandomize=True)
@given(
    seed=st.integers(0, 99),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(0, VOCAB + 1),
    top_p=st.one_of(st.just(1.0), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
)
def test_filters_keep_exactly_what_sorting_keeps(seed, temperature, top_k, top_p, min_p):
    """Logits lie within ln 4 at this temperature, so 2048 draws find every token that is kept."""
    rng = np.random.default_rng(seed)
    logits = (temperature * math.log(4) * rng.permutation(VOCAB) / (VOCAB - 1)).astype(np.float32)
    params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
    assume(not decided_by_rounding(logits, **params))
    drawn = frequencies(logits, 2048, **params)
    assert set(np.flatnonzero(drawn).tolist()) == kept_tokens(logits, **params)


@pytest.mark.parametrize(
    "params", [{"top_k": 5}, {"top_p": 0.6}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.8, "min_p": 0.02}]
)
def test_filters_hold_in_a_large_vocabulary(params):
    logits = normal_logits(1, 50_000, 2.5).astype(np.float32)
    kept = kept_tokens(logits, 1.0, **params)
    drawn = set(np.flatnonzero(frequencies(logits, 64, temperature=1.0, **params)).tolist())
    assert len(drawn) > 1
    assert drawn <= kept


def test_tokens_tied_with_the_last_kept_one_are_kept():
    logits = np.array([1.0, 2.0, 1.0, 0.0, 1.0, -1.0, -2.0, -3.0])
    drawn = frequencies(logits, 2048, temperature=1.0, top_k=2)
    assert set(np.flatnonzero(drawn).tolist()) == {0, 1, 2, 4}


@pytest.mark.parametrize("params", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_the_narrowest_filters_are_greedy(params):
    logits = normal_logits(2, VOCAB)
    assert frequencies(logits, 256, temperature=5.0, **params)[logits.argmax()] == 256


# -- how often ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_their_probability_says(temperature):
    logits = normal_logits(3, 8)
    counts = frequencies(logits, 20_000, temperature=temperature)
    assert chi_square(counts, softmax(logits / temperature)) < CHI_SQUARE_7
    other = softmax(logits / (1.2 * temperature))  # the test can tell 20 % of temperature
    assert chi_square(counts, other) > CHI_SQUARE_7


def test_what_filters_keep_is_drawn_in_proportion():
    logits = normal_logits(4, VOCAB)
    kept = sorted(kept_tokens(logits, 1.0, top_k=8))
    probabilities = softmax(logits)[kept]
    counts = frequencies(logits, 20_000, temperature=1.0, top_k=8)
    assert counts.sum() == counts[kept].sum()
    assert chi_square(counts[kept], probabilities / probabilities.sum()) < CHI_SQUARE_7


def test_positions_of_a_request_draw_independently():
    """One seed at each position is as random as one position of many seeds."""
    logits, sampling = normal_logits(5, 8), SamplingParams(temperature=1.0)
    requests = [make_request(seed, output=[1] * n, sampling=sampling) for seed in range(500) for n in range(31)]
    tokens = draw(logits, requests).tokens
    assert chi_square(np.bincount(tokens, minlength=8), softmax(logits)) < CHI_SQUARE_7
    by_seed = tokens.reshape(500, 31)
    assert len({tuple(row) for row in by_seed.tolist()}) == 500
    repeats = (by_seed[:, 1:] == by_seed[:, :-1]).mean()
    assert repeats == pytest.approx((softmax(logits) ** 2).sum(), abs=0.02)


# -- penalties, biases -------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    seed=SEEDS,
    prompt=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    output=st.lists(st.integers(0, 9), max_size=8),
    repetition=st.floats(0.5, 2.0),
    presence=st.floats(-2.0, 2.0),
    frequency=st.floats(-2.0, 2.0),
    bias=st.dictionaries(st.integers(0, 9), st.floats(-5, 5), max_size=4),
)
def test_penalties_and_biases_move_the_logits_as_defined(seed, prompt, output, repetition, presence, frequency, bias):
    logits = np.random.default_rng(seed).standard_normal(10)
    expected = logits.copy()
    for token in {*prompt, *output}:
        expected[token] *= 1 / repetition if expected[token] > 0 else repetition
    for token in output:
        expected[token] -= frequency
    for token in set(output):
        expected[token] -= presence
    for token, value in bias.items():
        expected[token] += value
    top = np.sort(expected)[-2:]
    assume(top[1] - top[0] > 1e-4)
    request = make_request(
        prompt=prompt,
        output=output,
        repetition_penalty=repetition,
        presence_penalty=presence,
        frequency_penalty=frequency,
        logit_bias=bias,
    )
    assert draw(logits, [request]).tokens[0] == expected.argmax()


def test_stop_tokens_are_held_back_until_min_tokens_are_there():
    logits = normal_logits(6, VOCAB)
    best, second, third = np.argsort(-logits)[:3].tolist()
    stop_ids = frozenset({best, second})
    for num_output, expected in ((0, third), (1, third), (2, best)):
        request = make_request(output=[0] * num_output, stop_ids=stop_ids, min_tokens=2)
        assert draw(logits, [request]).tokens[0] == expected
    sampled = [make_request(s, stop_ids=stop_ids, min_tokens=1, temperature=5.0) for s in range(256)]
    assert not set(draw(logits, sampled).tokens.tolist()) & stop_ids


def test_a_bias_of_minus_infinity_bans_a_token_at_any_temperature():
    logits = normal_logits(7, VOCAB)
    best = int(logits.argmax())
    banned = {best: -math.inf}
    assert frequencies(logits, 512, temperature=3.0, logit_bias=banned)[best] == 0
    assert draw(logits, [make_request(logit_bias=banned)]).tokens[0] == np.argsort(-logits)[1]


# -- each row by itself ------------------------------------------------------------------------------------

VARIED = (
    {},
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5, "logprobs": 3},
    {"temperature": 1.2, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.1, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.3, "logprobs": 0},
    {"temperature": 1.0, "logit_bias": {4: 2.0}},
)


@settings(max_examples=20)
@given(data=st.data(), seed=SEEDS)
def test_a_rows_token_depends_neither_on_the_other_rows_nor_on_its_place(data, seed):
    """Alone among padding, or in any order with rows that ask for other parameters."""
    logits = np.random.default_rng(seed).standard_normal((len(VARIED), VOCAB)).astype(np.float32)
    requests = [make_request(seed=seed ^ i, output=(i, 1), **params) for i, params in enumerate(VARIED)]
    order = data.draw(st.permutations(range(len(VARIED))))
    together = draw(logits[order], [requests[i] for i in order], rows=16)
    for place, i in enumerate(order):
        alone = draw(logits[i : i + 1], [requests[i]], rows=8)
        assert alone.tokens[0] == together.tokens[place]
        if requests[i].sampling.logprobs is not None:
            np.testing.assert_allclose(alone.logprobs[0], together.logprobs[place], rtol=1e-6)
