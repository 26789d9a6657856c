"""Rows that share a prefix read it together, where that pays, and get the tokens that they would get by themselves."""

import numpy as np
import pytest

from fineserve_jax.engine.engine import Engine
from fineserve_jax.pallas_kernels.shared_prefixes import find_shared_prefixes
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner import inputs

RNG = np.random.default_rng(11)
COMMON = RNG.integers(1, 90, 170).tolist()
PROMPTS = [[*COMMON, *RNG.integers(1, 90, 3 + i).tolist()] for i in range(7)] + [RNG.integers(1, 90, 40).tolist()]
NAMES = ("fp32", "int8", "int4")


@pytest.fixture(scope="module")
def engine(make_engine) -> Engine:
    return make_engine(kv_precision="int8")


@pytest.fixture
def saved(monkeypatch) -> list[int]:
    """Tokens that each step needed not read again."""
    counts: list[int] = []

    def note(*arguments):
        found = find_shared_prefixes(*arguments)
        counts.append(found.num_saved)
        return found

    monkeypatch.setattr(inputs, "find_shared_prefixes", note)
    return counts


def answers(engine: Engine, name: str, shares: bool) -> list[list[int]]:
    engine.runner.shares = shares
    sampling = SamplingParams(max_tokens=24, ignore_eos=True, temperature=0.6, seed=3)
    requests = [engine.add_request(prompt, sampling, RequestOptions(kv_precision=name)) for prompt in PROMPTS]
    while engine.has_unfinished:
        engine.step()
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_tokens_are_the_same(engine, saved, name):
    together = answers(engine, name, shares=True)
    assert max(saved) == 6 * 160  # ten whole pages of seven rows
    del saved[:]
    assert together == answers(engine, name, shares=False)
    assert not saved


def test_short_prefixes_are_read_by_each_row(engine, saved, monkeypatch):
    monkeypatch.setattr(inputs, "MIN_SAVED_TOKENS", 6 * 160 + 1)
    answers(engine, "int8", shares=True)
    assert set(saved) == {0}


def test_nothing_is_compiled_for_them_after_a_warm_up(engine, saved):
    engine.runner.shares = True
    engine.warm_up(NAMES)
    before = engine.stats().num_compilations
    for name in NAMES:
        answers(engine, name, shares=True)
    assert max(saved) > 0
    assert engine.stats().num_compilations == before
