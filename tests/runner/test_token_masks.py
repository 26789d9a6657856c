"""What may be sampled for requests with structured outputs: tokens, and where the text may end, end-of-sequence."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampler_cases import draw, make_request, normal_logits

from fineserve_jax.request.structured.params import StructuredOutputsParams
from fineserve_jax.request.structured.vocabulary import Vocabulary
from fineserve_jax.runner.token_masks import build_masks

LETTERS = "abcdefgh"
EOS, OTHER_EOS, STOP = 8, 9, 0
SIZE = 70  # not a multiple of 32; tokens from 10 on have no text
VOCABULARY = Vocabulary(
    [*(letter.encode() for letter in LETTERS), *[b""] * (SIZE - 8)], [EOS, OTHER_EOS], lambda text: list(text.encode())
)


def constrained(regex: str, output: str = "", **params):
    """A request whose text is to match, and what it has said so far."""
    matcher = VOCABULARY.matcher(StructuredOutputsParams(regex=regex))
    tokens = [LETTERS.index(letter) for letter in output]
    for token in tokens:
        matcher.accept(token)
    stop_ids = frozenset({STOP} if params.pop("stops_at_a", False) else ())
    if not params.get("ignore_eos"):
        stop_ids |= {EOS, OTHER_EOS}
    request = make_request(output=tokens, stop_ids=stop_ids, **params)
    request.matcher = matcher
    return request


def allowed(request) -> set[int]:
    masks = build_masks([request], 8, SIZE, (EOS, OTHER_EOS))
    assert masks.allowed.shape == (8, 3)
    bits = np.unpackbits(np.ascontiguousarray(masks.allowed[0]).view(np.uint8), bitorder="little")[:SIZE]
    assert (masks.allowed[1:] == 0xFFFFFFFF).all()
    return set(np.flatnonzero(bits).tolist())


def test_nothing_is_made_where_everything_may_be_sampled():
    assert build_masks([make_request(), make_request()], 8, SIZE, (EOS,)) is None
    assert (build_masks([make_request()], 8, SIZE, (EOS,), always=True).allowed == 0xFFFFFFFF).all()


@pytest.mark.parametrize(
    ("regex", "output", "params", "expected"),
    [
        ("[ab]c", "", {}, {0, 1}),
        ("[ab]c", "a", {}, {2}),
        ("[ab]+", "a", {}, {0, 1, EOS, OTHER_EOS}),
        ("[ab]+", "a", {"ignore_eos": True}, {0, 1}),
        ("[ab]+", "a", {"min_tokens": 2}, {0, 1}),
        ("[ab]+", "ab", {"min_tokens": 2}, {0, 1, EOS, OTHER_EOS}),
        ("[ab]+", "b", {"min_tokens": 2, "stops_at_a": True}, {1}),
        ("[a]+b", "a", {"min_tokens": 5, "stops_at_a": True}, {1}),
        ("a*b", "a", {"logit_bias": {1: -math.inf}}, {0}),
        ("a*b", "a", {"logit_bias": {1: -100.0}}, {0, 1}),
        ("a*", "", {"logit_bias": {0: -math.inf}}, {EOS, OTHER_EOS}),
        # Where only the end is left, it is not held back.
        ("", "", {"min_tokens": 5}, {EOS, OTHER_EOS}),
        ("", "", {"ignore_eos": True}, {EOS, OTHER_EOS}),
        ("aa", "a", {"min_tokens": 5, "stops_at_a": True}, {STOP}),
    ],
)
def test_what_may_follow(regex, output, params, expected):
    request = constrained(regex, output, **params)
    assert allowed(request) == expected
    assert request.matcher.is_complete == (regex == "")


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (constrained("x"), "no token of the model continues the text"),
        (constrained("[ab]", logit_bias={0: -math.inf, 1: -math.inf}), "logit_bias bans all tokens that may follow"),
    ],
    ids=["vocabulary", "logit_bias"],
)
def test_a_request_for_which_nothing_is_left_is_stuck_and_the_others_are_not(request_, reason):
    other = constrained("[ab]c")
    masks = build_masks([request_, other, make_request()], 8, SIZE, (EOS,))
    assert masks.stuck == {request_: reason}
    assert (masks.allowed[0] == 0xFFFFFFFF).all()
    assert masks.allowed[1, 0] == 0b11


def test_a_model_without_end_of_sequence_tokens_ends_where_nothing_may_follow():
    request = constrained("ab", "a")
    assert build_masks([request], 8, SIZE, ()).stuck == {}
    request.matcher.accept(1)
    assert request.matcher.is_complete


# -- in the sampler ----------------------------------------------------------------------------------------------


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    excluded=st.sets(st.integers(0, 63), max_size=63),
    params=st.sampled_from(
        [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 3, "top_p": 0.9}, {"repetition_penalty": 1.4}]
    ),
)
def test_a_mask_excludes_as_a_bias_of_minus_infinity_does(seed, excluded, params):
    logits = normal_logits(seed, 64).astype(np.float32)
    biased = make_request(seed, output=(1, 2), logit_bias=dict.fromkeys(excluded, -math.inf), **params)
    plain = make_request(seed, output=(1, 2), **params)
    mask = np.full((2, 2), 0xFFFFFFFF, np.uint32)
    for token in excluded:
        mask[0, token // 32] &= ~np.uint32(1 << token % 32)
    masked = draw(logits, [plain, plain], allowed=mask)
    assert masked.tokens[0] == draw(logits, [biased]).tokens[0]
    assert masked.tokens[1] == draw(logits, [plain]).tokens[0]
    assert masked.finite.tolist() == [True, True]


@pytest.mark.parametrize("params", [{}, {"temperature": 1.0}, {"logprobs": 2}])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_mask_hides_nothing_that_is_not_finite(params, value):
    logits = normal_logits(0, 64).astype(np.float32)
    logits[5] = value
    only_one = np.zeros((1, 2), np.uint32)
    only_one[0, 0] = 0b10
    assert draw(logits, [make_request(**params)], allowed=only_one).finite.tolist() == [False]


def test_log_probabilities_are_those_of_the_model_with_nothing_excluded():
    logits = normal_logits(1, 64).astype(np.float32)
    request = make_request(logprobs=5)
    free, only_one = draw(logits, [request]), np.zeros((1, 2), np.uint32)
    only_one[0, 1] = 0b100
    masked = draw(logits, [request], allowed=only_one)
    assert masked.tokens[0] == 34
    np.testing.assert_array_equal(masked.top_ids, free.top_ids)
    np.testing.assert_allclose(masked.logprobs[0], logits[34] - np.log(np.exp(logits).sum()), rtol=1e-5)
