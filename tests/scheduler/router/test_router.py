"""Where requests go, of what replicas are predicted to give them."""

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fineserve_jax.errors import ModelNotServedError
from fineserve_jax.scheduler.router import Asked, Outlook, Queue, Router, SentPrefixes, Waiting, choose, find_moves
from fineserve_jax.scheduler.router.choice import ABOUT
from fineserve_jax.scheduler.router.moves import LEAST_GAIN, LEAST_GAIN_S
from fineserve_jax.scheduler.router.router import BLOCK_TOKENS, block_hashes

seconds = st.floats(0, 100, allow_nan=False)
outlooks = st.lists(
    st.builds(Outlook, seconds, seconds, st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=6
)
targets = st.none() | st.floats(0.01, 50)
ASKED = Asked("m", "int8", list(range(100)), 50)


@given(outlooks, st.floats(1, 500), targets, targets)
def test_a_request_goes_where_its_targets_are_met_and_of_those_where_it_is_done_first(found, tokens, ttft, tpot):
    chosen = found[choose(found, tokens, ttft, tpot)]
    for other in found:
        missed = [
            (ttft is not None and one.ttft_s > ttft) + (tpot is not None and one.tpot_s > tpot)
            for one in (chosen, other)
        ]
        assert missed[0] <= missed[1]
        if missed[0] == missed[1]:
            done_s, other_s = (one.ttft_s + (tokens - 1) * one.tpot_s for one in (chosen, other))
            assert done_s <= other_s * (1 + ABOUT) * (1 + 1e-12)
            if other_s <= done_s:
                assert chosen.cached_tokens >= other.cached_tokens


def test_of_those_that_are_done_at_about_the_same_time_the_one_with_the_prefix_takes_it_or_with_fewer_requests():
    assert choose([Outlook(1, 1, 3, 9), Outlook(1, 1, 2, 9), Outlook(1, 1, 2, 9)], 10) == 1
    assert choose([Outlook(1.0, 0.1, 0, 0), Outlook(1.1, 0.1, 5, 16)], 1) == 1
    assert choose([Outlook(1.0, 0.1, 0, 0), Outlook(1.2, 0.1, 0, 16)], 1) == 0


# -- prefixes ------------------------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.integers(0, 2), max_size=8), max_size=30), st.integers(1, 12))
def test_prefixes_are_those_that_were_sent_the_oldest_and_their_ends_forgotten_first(prompts, most):
    sent, order = SentPrefixes(most), []
    for prompt in prompts:
        blocks = [bytes(prompt[: n + 1]) for n in range(len(prompt))]
        sent.note(blocks)
        order = [block for block in order if block not in blocks] + blocks[::-1]
        kept = set(order[-most:])
        assert len(sent) == len(kept)
        for other in prompts:
            others = [bytes(other[: n + 1]) for n in range(len(other))]
            known = sent.num_known(others)
            assert set(others[:known]) <= kept
            assert known == len(others) or others[known] not in kept


def test_blocks_are_of_one_model_and_precision_and_not_of_a_prompts_last_token():
    blocks = block_hashes(ASKED)
    assert len(blocks) == 99 // BLOCK_TOKENS
    assert block_hashes(replace(ASKED, token_ids=ASKED.token_ids[:BLOCK_TOKENS])) == []
    longer = block_hashes(replace(ASKED, token_ids=[*ASKED.token_ids, 5, 6]))
    assert longer[: len(blocks)] == blocks
    for other in (replace(ASKED, model="n"), replace(ASKED, kv_precision="bf16")):
        assert not set(block_hashes(other)) & set(blocks)


# -- the router ----------------------------------------------------------------------------------------------------


@dataclass
class Station:
    """A replica that computes 1,000 prompt tokens a second and takes each request's output tokens at 10 ms."""

    models: tuple[str, ...] = ("m",)
    busy_s: float = 0.0
    most_blocks: int = 1000
    sent: list[int] = field(default_factory=list)

    def outlook(self, asked: Asked, cached_tokens: int) -> Outlook:
        self.sent.append(cached_tokens)
        return Outlook(self.busy_s + (len(asked.token_ids) - cached_tokens) / 1000, 0.0, 0, cached_tokens)

    def output_tokens(self, asked: Asked) -> float:
        return asked.most_output_tokens


def test_requests_that_begin_alike_go_where_the_prefix_is_while_that_pays():
    stations = {"a": Station(), "b": Station()}
    router = Router(stations)
    assert router.route(ASKED) == "a"
    assert router.route(ASKED) == "a"
    assert stations["a"].sent == [0, 96]
    stations["a"].busy_s = 0.05
    assert router.route(ASKED) == "a"  # 0.05 s of waiting, and 0.096 s less to compute
    stations["a"].busy_s = 0.2
    assert router.route(ASKED) == "b"
    assert router.cached_tokens("b", ASKED) == 96
    router.forget("b")
    assert (router.cached_tokens("a", ASKED), router.cached_tokens("b", ASKED)) == (96, 0)


def test_a_target_comes_before_a_prefix():
    stations = {"a": Station(), "b": Station()}
    router = Router(stations)
    router.route(ASKED)
    stations["a"].busy_s = 0.09
    assert router.route(replace(ASKED, ttft_slo_s=0.5)) == "a"
    stations["a"].busy_s, stations["b"].busy_s = 0.95, 0.9
    assert router.route(replace(ASKED, ttft_slo_s=0.96)) == "a"
    assert router.route(replace(ASKED, ttft_slo_s=0.9)) == "a"  # neither meets it


def test_a_request_goes_to_replicas_that_serve_its_model():
    router = Router({"a": Station(("m",), busy_s=9.0), "b": Station(("n",))})
    assert router.route(ASKED) == "a"
    assert router.route(replace(ASKED, model="n")) == "b"
    for model, among in (("x", None), ("m", ["b"])):
        with pytest.raises(ModelNotServedError, match=f"model='{model}' is served by no replica"):
            router.route(replace(ASKED, model=model), among)


# -- moves ---------------------------------------------------------------------------------------------------------

queues = st.dictionaries(
    st.sampled_from("abcd"),
    st.builds(Queue, st.booleans(), st.lists(st.builds(Waiting, st.uuids(), seconds), max_size=5)),
    min_size=1,
)


@given(queues, st.dictionaries(st.sampled_from("abcd"), st.none() | seconds), st.integers(1, 4))
def test_moves_go_from_replicas_that_are_short_to_others_and_are_worth_it(found, waits, most):
    moved = find_moves(
        found, lambda name, what, before: None if waits.get(name) is None else waits[name] + before, most
    )
    assert len(moved) <= most
    assert len({what for what, _, _ in moved}) == len(moved)
    before = dict.fromkeys(found, 0)
    for what, source, target in moved:
        assert found[source].is_short
        assert not found[target].is_short
        (wait_s,) = [one.wait_s for one in found[source].waiting if one.what == what]
        gain = wait_s - waits[target] - before[target]
        assert gain >= max(LEAST_GAIN_S, LEAST_GAIN * wait_s)
        before[target] += 1


def test_the_request_that_would_begin_last_is_moved_first():
    found = {"a": Queue(True, [Waiting("x", 2.0), Waiting("y", 4.0)]), "b": Queue(False, [])}
    assert find_moves(found, lambda name, what, before: 0.5 + before, most=9) == [("y", "a", "b")]
    assert find_moves(found, lambda name, what, before: 0.1, most=1) == [("y", "a", "b")]
