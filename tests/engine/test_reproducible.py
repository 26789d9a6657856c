"""Reproducible: a request's tokens and log-probabilities are the same, bit for bit, whatever happens around it."""

import random
from contextlib import suppress

import numpy as np
import pytest
from engine_cases import random_model

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

FORMATS = ("bf16", "int8", "int4")
RNG = np.random.default_rng(8)
SHARED = RNG.integers(1, 96, 70).tolist()  # two whole chunks that some prompts have in common, and six tokens
PROMPTS = [[*SHARED[: (0, 70, 40)[i % 3]], *RNG.integers(1, 96, 1 + 11 * i % 60).tolist()] for i in range(14)]
PROMPTS[5] = PROMPTS[1]
PROMPTS[9] = SHARED[:64]


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Not here: the programs are those that users run."""


def request_of(i: int) -> tuple[list[int], SamplingParams, RequestOptions]:
    sampling = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.8, "top_p": 0.9, "seed": i},
        {"temperature": 1.0, "repetition_penalty": 1.3, "logit_bias": {5: 2.0}},
    ][i % 4]
    params = SamplingParams(max_tokens=8 + 5 * i % 37, ignore_eos=True, logprobs=3, n=2 if i == 4 else 1, **sampling)
    return PROMPTS[i], params, RequestOptions(kv_precision=FORMATS[(i + i // 4) % 3])


class Disorder:
    """Serves requests in a random order that come at random times, of which some lose their memory."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.rng = engine, random.Random(seed)

    def serve(self, numbers: list[int]) -> dict[int, list]:
        left, served = list(numbers), {}
        self.rng.shuffle(left)
        while left or self.engine.has_unfinished:
            while left and self.rng.random() < 0.5:
                i = left.pop()
                served[i] = self.engine.queue(self.engine.prepare(*request_of(i)))
            self.engine.step()
            if self.rng.random() < 0.03:
                self._cut_short()
        check_integrity(self.engine.kv)
        found = {i: [bits_of(sample) for sample in samples] for i, samples in served.items()}
        for request in (request for samples in served.values() for request in samples):
            self.engine.release(request)
        return found

    def _cut_short(self) -> None:
        """As an interrupt would: everything is computed again."""
        with suppress(KeyboardInterrupt), self.engine._recovery.changing():
            raise KeyboardInterrupt
        self.engine.recover()


def bits_of(request) -> tuple:
    """Tokens, and log-probabilities as they are, to the last bit."""
    logprobs = [(entry.logprob.hex(), {t: v.hex() for t, v in entry.top.items()}) for entry in request.logprobs]
    return request.output_token_ids, logprobs


def make(weights: str = "fp32", **settings) -> Engine:
    defaults = {"max_seq_len": 192, "max_batch_size": 8, "max_chunk_tokens": 32, "kv_memory": "320KB"}
    config = {"kv_formats": FORMATS, "kv_precision": "int4", "reproducible": True}
    return Engine(random_model(weights=weights), EngineConfig(**(defaults | config | settings)))


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=["fp32", slow("bf16"), slow("int8")])
def alone(request):
    """What each request gives with nothing else in the engine, and nothing cached."""
    engine, found = make(request.param, prefix_cache="off"), {}
    for i in range(len(PROMPTS)):
        found |= Disorder(engine, 0).serve([i])
    return request.param, found


@pytest.mark.parametrize(
    "settings",
    [{"preemption": "recompute"}, {"preemption": "swap"}, slow({"policy": "fcfs"}), slow({"prefix_cache": "off"})],
    ids=str,
)
def test_a_request_has_the_same_bits_in_any_company(alone, settings):
    weights, expected = alone
    engine = make(weights, **settings)
    for seed in range(2):  # the second time, pages of the first are cached
        found = Disorder(engine, seed).serve(list(range(len(PROMPTS))))
        assert found.keys() == expected.keys()
        for i in found:
            assert found[i] == expected[i], f"prompt {i}"
    assert engine.scheduler.num_preemptions > 0, "the memory was meant to be too small"
    if settings.get("prefix_cache") != "off":
        assert engine.kv.pool.prefix_cache.stats.hit_tokens > 0, "prompts were meant to share pages"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kv_precision": "auto"}, "reproducible with kv_precision='auto' or min_kv_precision"),
        ({"min_kv_precision": "int4", "kv_precision": "bf16"}, "reproducible with kv_precision='auto'"),
        ({"prefix_cache": "convert"}, "reproducible with prefix_cache='convert'"),
        ({"chunked_prefill": False}, "reproducible with chunked_prefill=False"),
    ],
    ids=str,
)
def test_settings_by_which_tokens_depend_on_others_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        EngineConfig(reproducible=True, **settings)


def test_a_request_that_may_be_narrowed_is_refused():
    with pytest.raises(RequestError, match="the engine is reproducible; give a fixed kv_precision"):
        make().prepare([1, 2], options=RequestOptions(kv_precision="auto"))
