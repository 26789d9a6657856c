"""Which of the tokens that a step samples behind drafts stand."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from sampler_cases import make_request

from fineserve_jax.request.request import ScheduledChunk
from fineserve_jax.runner.results import SampledToken, accepted


def what_stands(drafts: list[list[int]], sampled: list[list[int]], finite: list[list[bool]]):
    """What stands of decodes with drafts, as lists of tokens; and whether each one's first logits are finite."""
    requests = [make_request() for _ in drafts]
    chunks = [
        ScheduledChunk(request, request.num_tokens - 1, 1, tuple(own))
        for request, own in zip(requests, drafts, strict=True)
    ]
    tokens = [
        SampledToken(request, token, None) for request, own in zip(requests, sampled, strict=True) for token in own
    ]
    flags = np.array([flag for own in finite for flag in own])
    kept, first = accepted(chunks, tokens, flags, np.ones_like(flags))
    return [[token.token for token in kept if token.request is request] for request in requests], first.values()


small = st.integers(0, 1)


@given(st.lists(st.lists(st.tuples(small, small), max_size=4), min_size=1, max_size=3), st.integers(0, 1))
def test_a_draft_stands_while_it_is_what_is_sampled(pairs, last):
    drafts = [[draft for draft, _ in own] for own in pairs]
    sampled = [[*(token for _, token in own), last] for own in pairs]
    kept, _ = what_stands(drafts, sampled, [[True] * len(own) for own in sampled])
    for found, own, tokens in zip(kept, pairs, sampled, strict=True):
        agree = next((i for i, (draft, token) in enumerate(own) if draft != token), len(own))
        assert found == tokens[: agree + 1]


def test_a_draft_whose_row_is_not_finite_is_left_to_the_next_step():
    kept, finite = what_stands([[5, 6, 7], [5]], [[5, 6, 7, 8], [5, 6]], [[True, True, False, True], [True, True]])
    assert kept == [[5, 6], [5, 6]]
    assert all(finite)
