"""A request's tokens depend on the request alone: not on its batch, its chunks, its preemptions or its place."""

import numpy as np
import pytest
from engine_cases import serve

from fineserve_jax.request.sampling_params import SamplingParams

FORMATS = ["fp32", "bf16", "int8", "int4"]
SAMPLINGS = [
    SamplingParams(max_tokens=40, ignore_eos=True),
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=1.0, top_p=0.9, top_k=40, seed=11),
    SamplingParams(max_tokens=40, ignore_eos=True, temperature=0.7, repetition_penalty=1.2, seed=5),
]


def prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 96, rng.integers(1, 120)).tolist() for _ in range(count)]


@pytest.fixture(scope="module")
def formats() -> list[str]:
    return [FORMATS[i % len(FORMATS)] for i in range(10)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "sampled", "penalised"])
def test_tokens_do_not_depend_on_what_shares_the_batch(make_engine, formats, sampling):
    together = serve(make_engine(), prompts(10), formats, sampling)
    engine = make_engine()
    for request, prompt in zip(together, prompts(10), strict=True):
        (alone,) = serve(engine, [prompt], [request.kv_precision], sampling)
        assert alone.output_token_ids == request.output_token_ids, request.kv_precision


@pytest.mark.parametrize(
    "settings",
    [
        {"chunked_prefill": False},
        {"max_chunk_tokens": 16},
        {"max_batch_size": 2},
        {"policy": "fcfs"},
        {"slab_policy": "uniform"},
        {"slab_policy": "partitioned"},
        {"page_size": 16, "kv_precision": "int8"},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_settings_of_the_schedule_or_the_memory(make_engine, formats, settings):
    expected = serve(make_engine(), prompts(10), formats, SAMPLINGS[0])
    changed = serve(make_engine(**settings), prompts(10), formats, SAMPLINGS[0])
    assert [r.output_token_ids for r in changed] == [r.output_token_ids for r in expected]


def test_tokens_do_not_depend_on_preemption(make_engine, formats):
    short = [prompt[:20] for prompt in prompts(10)]
    sampling = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=3)
    expected = serve(make_engine(), short, formats, sampling)
    small = make_engine(kv_memory="280KB", kv_precision="int4")
    squeezed = serve(small, short, formats, sampling)
    assert small.stats().num_preemptions > 0, "the memory was meant to be too small"
    assert [r.output_token_ids for r in squeezed] == [r.output_token_ids for r in expected]


def test_tokens_do_not_depend_on_the_order_of_arrival(make_engine, formats):
    expected = serve(make_engine(), prompts(10), formats, SAMPLINGS[0])
    turned = serve(make_engine(), prompts(10)[::-1], formats[::-1], SAMPLINGS[0])
    assert [r.output_token_ids for r in turned[::-1]] == [r.output_token_ids for r in expected]


def test_a_seed_fixes_the_tokens_and_another_changes_them(make_engine):
    engine, prompt = make_engine(), prompts(1)
    first, again, other = (
        serve(
            engine,
            prompt,
            ["bf16"],
            SamplingParams(max_tokens=30, temperature=1.0, seed=seed, ignore_eos=True),
        )[0]
        for seed in (1, 1, 2)
    )
    assert first.output_token_ids == again.output_token_ids != other.output_token_ids
