"""The profile of step times learns the machine it is on."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scheduler_cases import COST, ROOFLINE

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler import DeviceRoofline, StepCost, StepProfile
from fineserve_jax.scheduler.profile import _nonnegative_least_squares

MACHINES = {
    "as the roofline says": [1.0, 0.0, 1.0, 1.0, 1.0, 0.0],
    "three to six times slower": [3.0, 0.5, 4.0, 6.0, 2.0, 0.0],
    "faster than told": [0.5, 0.0, 0.3, 0.2, 0.7, 0.0],
    "widening takes as long as reading": [2.0, 0.1, 2.0, 2.0, 1.0, 4.0],
}


def random_steps(rng, number):
    """Steps of 1 to 64 decode rows in either of two KV formats and, half of them, a chunk of up to 512 tokens."""
    for _ in range(number):
        rows, context = rng.integers(1, 65), rng.integers(16, 2048)
        chunk = int(rng.integers(2, 513)) if rng.random() < 0.5 else 0
        start = int(rng.integers(0, 1024))
        pairs = chunk * start + chunk * (chunk + 1) // 2
        cached = int(rows * context + start * (chunk > 0))
        yield StepCost(int(rows) + chunk, pairs, float(cached * rng.choice([1000, 4000])), cached)


def machine(coefficients):
    truth = StepProfile(COST, ROOFLINE)
    truth.coefficients = np.array(coefficients)
    truth._publish()
    return truth


@pytest.mark.parametrize("coefficients", MACHINES.values(), ids=MACHINES)
def test_it_comes_within_a_tenth_of_the_truth_under_noise_and_outliers(coefficients):
    """8 % noise, and one step in ten takes three times as long."""
    rng, truth, profile = np.random.default_rng(0), machine(coefficients), StepProfile(COST, ROOFLINE)
    for cost in random_steps(rng, 300):
        outlier = 3.0 if rng.random() < 1 / 10 else 1.0
        profile.observe(cost, truth.predict(cost) * rng.lognormal(0.0, 0.08) * outlier)
    for cost in random_steps(rng, 500):
        assert profile.predict(cost) == pytest.approx(truth.predict(cost), rel=0.1)
    assert 0.0 < profile.error < 0.25


def test_its_error_is_reported_and_falls():
    rng, truth, profile = (
        np.random.default_rng(1),
        machine([3.0, 0.5, 4.0, 6.0, 2.0, 1.0]),
        StepProfile(COST, ROOFLINE),
    )
    assert profile.error is None
    steps = list(random_steps(rng, 200))
    profile.observe(steps[0], truth.predict(steps[0]))
    at_first = profile.error
    for cost in steps[1:]:
        profile.observe(cost, truth.predict(cost))
    assert at_first > 0.5
    assert profile.error < 0.01
    assert profile.num_observed == 200


def test_no_step_is_predicted_to_take_no_time():
    """Even where only cached tokens were seen to take any, and a step reads none."""
    truth, profile = machine([0.0, 0.0, 0.0, 0.0, 0.0, 5.0]), StepProfile(COST, ROOFLINE)
    for cost in random_steps(np.random.default_rng(0), 1000):
        profile.observe(cost, truth.predict(cost))
    assert (profile.coefficients[:3] == 0.0).all()
    assert profile.predict(StepCost(1, 0, 0.0)) > 0.0


def test_it_follows_a_machine_that_changes():
    rng, profile = np.random.default_rng(2), StepProfile(COST, ROOFLINE)
    for coefficients in ([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], [2.5, 0.2, 2.0, 2.0, 3.0, 0.0]):
        truth = machine(coefficients)
        for cost in random_steps(rng, 1000):
            profile.observe(cost, truth.predict(cost) * rng.lognormal(0.0, 0.05))
    for cost in random_steps(rng, 100):
        assert profile.predict(cost) == pytest.approx(truth.predict(cost), rel=0.15)


def test_a_step_a_hundred_times_too_long_moves_it_by_little():
    rng, truth, profile = (
        np.random.default_rng(3),
        machine([2.0, 0.1, 2.0, 2.0, 2.0, 0.0]),
        StepProfile(COST, ROOFLINE),
    )
    for cost in random_steps(rng, 100):
        profile.observe(cost, truth.predict(cost))
    for cost in list(random_steps(rng, 3)):
        profile.observe(cost, 100.0 * truth.predict(cost))
    for cost in random_steps(rng, 100):
        assert profile.predict(cost) == pytest.approx(truth.predict(cost), rel=0.05)


def test_what_no_step_shows_is_not_forgotten():
    """Thousands of decode steps leave what was learnt of prefill."""
    rng, truth, profile = (
        np.random.default_rng(4),
        machine([3.0, 0.5, 4.0, 6.0, 2.0, 1.0]),
        StepProfile(COST, ROOFLINE),
    )
    for cost in random_steps(rng, 300):
        profile.observe(cost, truth.predict(cost))
    chunk = StepCost(528, 512 * 513 // 2, 1e6)
    for _ in range(4000):
        rows = int(rng.integers(1, 65))
        cost = StepCost(rows, 0, rows * 4e6)
        profile.observe(cost, truth.predict(cost) * rng.lognormal(0.0, 0.05))
    assert profile.predict(chunk) == pytest.approx(truth.predict(chunk), rel=0.1)


def test_its_sum_is_right_where_times_scatter():
    """What a fit of relative errors predicts of such times is 4 % too little."""
    rng, truth = np.random.default_rng(5), machine([2.0, 0.1, 2.0, 2.0, 2.0, 0.0])
    profile = StepProfile(COST, ROOFLINE)
    for cost in random_steps(rng, 600):
        profile.observe(cost, truth.predict(cost) * rng.lognormal(0.0, 0.15))
    taken, predicted = 0.0, 0.0
    for cost in random_steps(rng, 600):
        taken += truth.predict(cost) * rng.lognormal(0.0, 0.15)
        predicted += profile.predict(cost)
    assert predicted == pytest.approx(taken, rel=0.025)
    assert profile.bias > 1.02


amounts = st.tuples(st.integers(1, 600), st.integers(0, 10**6), st.floats(0, 1e9), st.floats(1e-6, 10.0))


@settings(max_examples=60)
@given(st.lists(amounts, max_size=20), amounts, amounts)
def test_more_work_is_never_predicted_to_take_less_time(observed, cost, more):
    """Whatever was observed: coefficients stay at or above zero."""
    profile = StepProfile(COST, ROOFLINE)
    for *amount, seconds in observed:
        profile.observe(StepCost(*amount), seconds)
    assert (profile.coefficients >= 0).all()
    cost, more = StepCost(*cost[:3]), StepCost(*more[:3])
    assert 0.0 <= profile.predict(cost) <= profile.predict(cost + more)


@settings(max_examples=200)
@given(st.integers(0, 10**6), st.integers(3, 12))
def test_the_fit_is_the_best_without_negative_coefficients(seed, rows):
    """Karush, Kuhn and Tucker: no gradient along a free coefficient, none downhill into one that is held at 0."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(rows, 5)) @ np.diag([1.0, 3.0, 0.3, 1.0, 1.0]), rng.normal(size=rows)
    gram, moment = a.T @ a + 1e-3 * np.eye(5), a.T @ b
    x = _nonnegative_least_squares(gram, moment)
    gradient = gram @ x - moment
    assert (x >= 0).all()
    np.testing.assert_allclose(gradient[x > 0], 0.0, atol=1e-6)
    assert (gradient[x == 0] >= -1e-6).all()


def test_bad_rates_and_times_are_refused():
    with pytest.raises(ConfigError, match=r"flops=0\.0 of the device roofline; give a positive rate"):
        DeviceRoofline(0.0, 1e9)
    with pytest.raises(ValueError, match=r"a step of 0\.0 seconds"):
        StepProfile(COST, ROOFLINE).observe(StepCost(1, 0, 0.0), 0.0)
