"""Finding the requests that make steps fail, on a model of an engine whose steps fail with some of them."""

import random

from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.engine.isolation import Isolation
from fineserve_jax.request import Request, RequestTimes
from fineserve_jax.sampling_params import SamplingParams


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
