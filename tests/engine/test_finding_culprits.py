"""Finding the requests that make steps fail, on a model of an engine whose steps fail with some of them."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.engine.isolation import CALM_STEPS, FAILURES_TO_HALVE, Isolation
from fineserve_jax.request.request import Request, RequestTimes
from fineserve_jax.request.sampling_params import SamplingParams


def a_request(i: int) -> Request:
    return Request(
        request_id=str(i),
        model="tiny",
        kv_precision="bf16",
        sampling=SamplingParams(),
        token_ids=[1],
        num_prompt_tokens=1,
        max_total_tokens=9,
        sequence=i,
        times=RequestTimes(0.0),
    )


@given(count=st.integers(1, 40), bad=st.sets(st.integers(0, 39)), seed=st.integers(0, 10), mishaps=st.integers(0, 1))
def test_those_that_fail_are_found_and_all_others_are_served(count, bad, seed, mishaps):
    """A step computes some of the requests that are served; with a bad one it fails, and now and then for no reason."""
    requests = [a_request(i) for i in range(count)]
    bad_ones = {request for i, request in enumerate(requests) if i in bad}
    isolation, rng = Isolation(), random.Random(seed)
    to_go, ended, steps = dict.fromkeys(requests, 4), [], 0
    while to_go:
        steps += 1
        assert steps < 100 * count
        served = [request for request in isolation.served or to_go if request in to_go]
        computing = rng.sample(served, rng.randint(1, len(served)))
        is_mishap = mishaps > 0 and rng.random() < 0.1
        mishaps -= is_mishap
        if is_mishap or bad_ones.intersection(computing):
            culprit = isolation.note_failure(computing)
            if culprit is not None:
                ended.append(culprit)
                del to_go[culprit]
                isolation.note_progress([culprit])
            continue
        for request in computing:
            to_go[request] -= 1
            if not to_go[request]:
                del to_go[request]
        isolation.note_progress(computing)
    assert set(ended) == bad_ones
    assert isolation.served is None


@given(count=st.integers(1, 300), retries=st.integers(0, 3), data=st.data())
def test_one_is_found_in_a_logarithm_of_failures_and_nobody_else_is_blamed(count, retries, data):
    requests = [a_request(i) for i in range(count)]
    culprit = requests[data.draw(st.integers(0, count - 1))]
    isolation, failures, passed = Isolation(retries), 1, []
    blamed = isolation.note_failure(requests)
    while group := isolation.served:
        if culprit in group:
            failures, blamed = failures + 1, isolation.note_failure(group)
        else:
            passed += group
            isolation.note_progress(group)
    assert blamed is culprit
    assert sorted(request.sequence for request in [*passed, culprit]) == list(range(count))
    assert failures <= (count - 1).bit_length() + 1 + retries


def test_one_that_fails_alone_now_and_then_begins_anew_with_each_token():
    request, isolation = a_request(0), Isolation(max_retries=1)
    for _ in range(5):
        assert isolation.note_failure([request]) is None
        assert isolation.served == [request]
        assert isolation.note_progress([request])
    assert isolation.note_failure([request]) is None
    assert isolation.note_failure([request]) is request


@pytest.mark.parametrize("count", [2, 9])
def test_requests_that_fail_only_together_are_served_fewer_at_a_time_until_it_is_calm(count):
    requests, isolation = [a_request(i) for i in range(count)], Isolation()
    for failures in range(FAILURES_TO_HALVE + 1):
        assert isolation.row_limit is None, failures
        isolation.note_failure(requests)
        while group := isolation.served:
            isolation.note_progress(group)
    assert isolation.row_limit == count // 2
    assert [isolation.note_progress(requests) for _ in range(CALM_STEPS)] == [False] * (CALM_STEPS - 1) + [True]
    assert isolation.row_limit is None
