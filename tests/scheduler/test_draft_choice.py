"""Where drafts come from, and which decodes get how many."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scheduler_cases import COST, MODEL, PAGE_SIZE, ROOFLINE, make_kv, make_request

from fineserve_jax.request.request import FinishReason, Request, SchedulerOutput
from fineserve_jax.scheduler import Scheduler, SchedulerConfig
from fineserve_jax.scheduler.drafting import Drafting
from fineserve_jax.scheduler.lookup import LONGEST, SHORTEST, Lookup
from fineserve_jax.scheduler.speculation import Speculation

tokens = st.lists(st.integers(0, 2), min_size=1, max_size=60)


@given(tokens, st.integers(1, 12))
def test_a_draft_follows_the_latest_of_the_longest_agreements(sequence, most):
    drafts = Lookup(sequence).find(most)
    for length in range(LONGEST, SHORTEST - 1, -1):
        places = [
            place for place in range(length, len(sequence)) if sequence[place - length : place] == sequence[-length:]
        ]
        if places and length <= len(sequence):
            repeated = list(sequence)
            while len(repeated) < places[-1] + most:  # it goes on as the sequence and the draft themselves do
                repeated.append(repeated[len(repeated) - len(sequence) + places[-1]])
            assert list(drafts) == repeated[places[-1] : places[-1] + most]
            return
    assert drafts == ()


@given(tokens, tokens)
def test_a_sequence_that_grows_is_looked_up_as_a_whole(first, more):
    growing = list(first)
    lookup = Lookup(growing)
    for token in more:
        lookup.find(3)
        growing.append(token)
    assert lookup.find(5) == Lookup(growing).find(5)


class Rows:
    """A scheduler of decodes with drafts, which are accepted or not as a test says."""

    def __init__(self, most: int, row_sizes: tuple[int, ...] = (1, 8), **settings) -> None:
        config = SchedulerConfig(page_size=PAGE_SIZE, max_chunk_tokens=16, **settings)
        self.speculation = Speculation(most, {MODEL: row_sizes})
        self.scheduler = Scheduler(config, make_kv(64), {MODEL: COST}, ROOFLINE, self.speculation)
        self.now = 0.0

    def add(self, request: Request) -> Request:
        request.token_ids[:] = [1, 2, 3, 4, 5] * (request.num_prompt_tokens // 5) + [1, 2, 3]
        request.num_prompt_tokens = len(request.token_ids)
        request.max_total_tokens = request.num_prompt_tokens + request.sampling.max_tokens
        self.scheduler.add(request)
        return request

    def step(self, *, accept: bool | list[Request], seconds: float = 0.01) -> SchedulerOutput:
        """`accept`: all drafts, none, or those of some requests."""
        self.now += seconds
        output = self.scheduler.schedule(self.now)
        assert output is not None
        accepting = [c.request for c in output.chunks if accept is True] if isinstance(accept, bool) else accept
        following = {c.request: [*c.drafts, 4] if c.request in accepting else [9] for c in output.chunks}
        for chunk in output.decodes:
            if chunk.drafts:
                self.scheduler.note_drafts(chunk, len(following[chunk.request]) - 1)
        advanced = self.scheduler.commit(output, [following[c.request][0] for c in output.chunks], self.now)
        for request in advanced:
            for token in following[request][1:]:
                assert self.scheduler.commit_draft(request, token)
            if request.num_tokens >= request.max_total_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH, self.now)
        self.scheduler.observe(output, seconds)
        return output


@pytest.mark.parametrize("kv", ["bf16", "int4"])
def test_drafts_lie_in_the_page_of_their_token(kv):
    rows = Rows(3)
    request = rows.add(make_request(0, 20, 40, kv=kv))
    seen = set()
    while rows.scheduler.has_unfinished:
        output = rows.step(accept=True)
        for chunk in output.decodes:
            last = chunk.start + len(chunk.drafts)
            assert last // PAGE_SIZE == chunk.start // PAGE_SIZE
            seen.add((len(chunk.drafts), last % PAGE_SIZE))
            # A page that is encoded as a whole is filled by a token that is known.
            assert kv == "bf16" or not chunk.drafts or last % PAGE_SIZE < PAGE_SIZE - 1
    assert len(seen) > 1
    assert request.num_tokens == request.max_total_tokens
    assert rows.speculation.num_accepted == rows.speculation.num_drafts > 0


def test_a_step_with_chunks_has_no_drafts():
    rows = Rows(3)
    rows.add(make_request(0, 20, 40))
    rows.step(accept=True)  # the whole prompt but what does not fit a chunk
    while not rows.step(accept=True).decodes:
        pass
    rows.add(make_request(1, 200, 4))
    output = rows.step(accept=True)
    assert output.prefills
    assert all(chunk.drafts == () for chunk in output.chunks)


def test_drafts_that_are_refused_are_given_up_and_tried_again_after_a_while():
    rows = Rows(3)
    request = rows.add(make_request(0, 20, 4000))
    counts = []
    for _ in range(400):
        request.token_ids[-3:] = [1, 2, 3]
        output = rows.scheduler.schedule(rows.now)
        counts += [len(chunk.drafts) for chunk in output.decodes]
        for chunk in output.decodes:
            if chunk.drafts:
                rows.scheduler.note_drafts(chunk, 0)
        rows.scheduler.commit(output, [9] * len(output.chunks), rows.now)
        rows.scheduler.observe(output, 0.01 + 0.015 * (output.num_decode_rows > 1))
    assert any(counts[:5])
    assert 0 < sum(map(bool, counts)) < len(counts) / 5
    assert any(counts[-200:])


def test_the_share_of_accepted_drafts_is_followed():
    drafting = Drafting([1])
    assert drafting.share == 1.0
    for _ in range(20):
        drafting.note(offered=3, accepted=3)
    assert drafting.share > 0.9
    for _ in range(60):
        drafting.note(offered=3, accepted=0)
    assert drafting.share < 0.2
    for _ in range(1500):
        drafting.fade()
    assert drafting.share > 0.98


def test_rows_with_likelier_drafts_have_more():
    rows = Rows(3, row_sizes=(4,), max_batch_size=2)
    good, bad = rows.add(make_request(0, 20, 300)), rows.add(make_request(1, 20, 300))
    offered = {good: 0, bad: 0}
    for _ in range(60):
        bad.token_ids[-3:] = [1, 2, 3]  # it always comes to where it was, and goes on otherwise
        for chunk in rows.step(accept=[good]).decodes:
            offered[chunk.request] += len(chunk.drafts)
    assert offered[good] > 1.3 * offered[bad]  # which has what is left, as that costs nothing


def test_a_request_with_structured_outputs_has_none():
    rows = Rows(3)
    request = rows.add(make_request(0, 20, 40))
    request.matcher = object()  # whatever it allows
    for _ in range(12):
        assert all(chunk.drafts == () for chunk in rows.step(accept=True).chunks)
