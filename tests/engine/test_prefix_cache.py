"""Requests that begin alike share pages: each prefix is computed once, and nobody's tokens change."""

import numpy as np
import pytest
from engine_cases import serve

from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.usage import count_events
from fineserve_jax.request.request import Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

FORMATS = ["bf16", "int8", "int4"]
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PREFIX = np.random.default_rng(0).integers(1, 96, 80).tolist()  # five pages


def beginning_alike(count: int) -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [PREFIX + rng.integers(1, 96, 3 + 7 * i % 40).tolist() for i in range(count)]


def tokens(requests: list[Request]) -> list[list[int]]:
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("arrival", ["together", "one after the other"])
def test_a_shared_prefix_is_computed_once_for_each_format(make_engine, arrival):
    prompts, formats = beginning_alike(9), FORMATS * 3
    engine = make_engine()
    if arrival == "together":
        found = serve(engine, prompts, formats, GREEDY)
    else:
        found = [serve(engine, [p], [f], GREEDY)[0] for p, f in zip(prompts, formats, strict=True)]
    own = sum(len(prompt) - len(PREFIX) for prompt in prompts)
    assert engine.stats().num_prompt_tokens == own + 3 * len(PREFIX)
    assert tokens(found) == tokens(serve(make_engine(prefix_cache="off"), prompts, formats, GREEDY))


def test_what_a_request_wrote_serves_the_next_turn(make_engine):
    engine = make_engine()
    (first,) = serve(engine, [PREFIX], ["int8"], SamplingParams(max_tokens=40, ignore_eos=True))
    before = engine.stats().num_prompt_tokens
    turn = [*first.token_ids, 5, 6, 7]
    (second,) = serve(engine, [turn], ["int8"], GREEDY)
    computed = engine.stats().num_prompt_tokens - before
    assert computed == len(turn) - (len(first.token_ids) - 1) // 16 * 16
    assert tokens([second]) == tokens(serve(make_engine(), [turn], ["int8"], GREEDY))


def test_others_go_on_when_the_request_that_computes_their_prefix_is_aborted(make_engine):
    prompts = beginning_alike(4)
    engine = make_engine(max_chunk_tokens=16)
    requests = [engine.add_request(prompt, GREEDY, RequestOptions(kv_precision="int8")) for prompt in prompts]
    engine.step()
    engine.abort(requests[0])
    check_integrity(engine.kv)
    engine.step()
    engine.abort(requests[1])
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    expected = serve(make_engine(prefix_cache="off"), prompts[2:], ["int8"] * 2, GREEDY)
    assert tokens(requests[2:]) == tokens(expected)


def test_sharing_under_preemption_changes_no_tokens(make_engine):
    prompts = [PREFIX[:16] + prompt[80:] for prompt in beginning_alike(10)]
    formats = [FORMATS[i % 3] for i in range(10)]
    long = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=3)
    engine = make_engine(kv_memory="200KB", kv_precision="int4", preemption="recompute")
    found = serve(engine, prompts, formats, long)
    assert engine.stats().num_preemptions > 0, "the memory was meant to be too small"
    assert count_events(engine.kv).evicted_pages > 0
    assert tokens(found) == tokens(serve(make_engine(prefix_cache="off"), prompts, formats, long))


@pytest.mark.parametrize("kv_precision", FORMATS)
@pytest.mark.parametrize("length", [33, 48, 80])
def test_a_fork_computes_one_token_and_goes_its_own_way(make_engine, kv_precision, length):
    sampling = SamplingParams(max_tokens=20, ignore_eos=True, temperature=1.0, seed=7)
    prompt = PREFIX[:length]
    engine = make_engine(prefix_cache="off")
    first = engine.add_request(prompt, sampling, RequestOptions(kv_precision=kv_precision))
    engine.step()  # the whole prompt
    if length > 64:
        engine.step()
    before = engine.stats().num_prompt_tokens
    assert before == length
    fork = engine.add_request(
        prompt, sampling, RequestOptions(kv_precision=kv_precision), sample_index=1, fork_of=first
    )
    while engine.has_unfinished:
        engine.step()
        check_integrity(engine.kv)
    # Where the prompt filled its last page, int4 has encoded it: the residual page that a fork starts from is gone.
    gone = kv_precision == "int4" and length % 16 == 0
    assert engine.stats().num_prompt_tokens == before + (length if gone else 1)
    alone = make_engine(prefix_cache="off")
    expected = [
        alone.add_request(prompt, sampling, RequestOptions(kv_precision=kv_precision), sample_index=sample)
        for sample in (0, 1)
    ]
    while alone.has_unfinished:
        alone.step()
    assert tokens([first, fork]) == tokens(expected)
    assert first.output_token_ids != fork.output_token_ids


def test_a_wider_prefix_is_converted_when_that_is_allowed(make_engine):
    prompts = beginning_alike(3)
    exact, convert = make_engine(), make_engine(prefix_cache="convert")
    for engine in (exact, convert):
        serve(engine, [prompts[0]], ["bf16"], GREEDY)
        before = engine.stats().num_prompt_tokens
        serve(engine, prompts[1:], ["int8", "int4"], GREEDY)
        computed = engine.stats().num_prompt_tokens - before
        own = sum(len(prompt) - len(PREFIX) for prompt in prompts[1:])
        assert computed == (own if engine is convert else own + 2 * len(PREFIX))
    assert count_events(convert.kv).converted_pages == 10
    assert count_events(exact.kv).converted_pages == 0
