"""How long who comes now would wait: a queue with several servers, against one that is played second by second."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.scheduler import DeviceRoofline, FormatCost, ModelCost, StepProfile
from fineserve_jax.scheduler.lengths import OutputLengths
from fineserve_jax.scheduler.waits import Ahead, WaitPredictor

MODEL = ModelCost(1e6, 0.0, 1e9, {"bf16": FormatCost(16.0, 0.0)})
ROOFLINE = DeviceRoofline(flops=1e15, bandwidth=1e9, overhead_s=0.0)
"""A decode step takes one second, whatever it decodes."""
PLACES = 3


def predictor(places=PLACES):
    return WaitPredictor(places, {"m": StepProfile(MODEL, ROOFLINE)}, OutputLengths())


def ahead(tokens, has_place):
    return Ahead("m", has_place, 1, 0, float(tokens))


def played(running, waiting, places):
    """Seconds until a place is free for the next one, a token of each running request a second."""
    running, waiting, seconds = sorted(running), list(waiting), 0
    while True:
        while waiting and len(running) < places:
            running.append(waiting.pop(0))
        if len(running) < places:
            return seconds
        running = [left - 1 for left in running]
        running = [left for left in running if left > 0]
        seconds += 1


@given(st.lists(st.integers(1, 30), max_size=PLACES), st.lists(st.integers(1, 30), max_size=12), st.booleans())
def test_the_wait_is_that_of_a_queue_with_as_many_servers(running, waiting, is_short):
    found = predictor().wait_s([ahead(n, True) for n in running] + [ahead(n, False) for n in waiting], is_short)
    # Where some wait in vain, the memory holds no more than run.
    places = max(len(running), 1) if is_short else PLACES
    assert found == pytest.approx(played(running, waiting, places))


@given(st.lists(st.tuples(st.integers(1, 30), st.booleans()), max_size=12), st.integers(1, 30))
def test_nobody_waits_less_for_one_more_ahead(others, more):
    requests = [ahead(n, has_place and i < PLACES) for i, (n, has_place) in enumerate(others)]
    waits = predictor()
    assert waits.wait_s([*requests, ahead(more, False)], False) >= waits.wait_s(requests, False)


def test_decoding_stands_still_while_a_prompt_is_computed():
    """A prompt of so few tokens takes one step of a second."""
    assert predictor(1).wait_s([Ahead("m", True, 100, 0, 5.0)], False) == pytest.approx(5.0 + 1.0)


@given(st.lists(st.integers(1, 30), max_size=PLACES), st.lists(st.integers(1, 30), max_size=6), st.integers(1, 200))
def test_a_first_token_comes_behind_the_wait_the_prompts_ahead_and_its_own(running, waiting, prompt):
    """A prompt takes a second, and so does a decode step."""
    waits, own = predictor(), Ahead("m", False, prompt, 0, 5.0)
    others = [ahead(n, True) for n in running] + [ahead(n, False) for n in waiting]
    own_s = 0.0 if prompt == 1 else 1.0
    wait_s = waits.wait_s(others, False)
    assert waits.first_token_s(others, own, False) == pytest.approx((wait_s + own_s, 1.0))
    if len(others) < PLACES:
        busy = [one._replace(prefill_tokens=50) for one in others]
        assert waits.first_token_s(busy, own, False)[0] == pytest.approx(len(busy) + own_s)


def test_what_is_ahead_of_a_model_that_was_unloaded_counts_for_nothing():
    gone = ahead(30, True)._replace(model="gone")
    assert predictor(1).wait_s([gone], False) == 0.0
    assert predictor(1).first_token_s([gone], Ahead("m", False, 10, 0, 5.0), True) == (1.0, 1.0)


def test_models_take_turns():
    profiles = {name: StepProfile(MODEL, ROOFLINE) for name in "mn"}
    waits = WaitPredictor(2, profiles, OutputLengths())
    assert waits.wait_s([ahead(5, True), Ahead("n", True, 1, 0, 7.0)], False) == pytest.approx(2 * 5.0)
