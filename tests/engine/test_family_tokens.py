"""The engine says what Hugging Face transformers says of the same weights, family by family, in float32.

Tokens may differ only where transformers' two best logits are within 0.001 of each other; what follows such a token is
not compared. `fixtures/make_model_fixtures.py` made what is expected.
"""

from pathlib import Path

import numpy as np
import pytest
from engine_cases import character_tokenizer, serve

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import pack_params
from fineserve_jax.request.sampling_params import SamplingParams

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz"))
# What the engine itself has to do for a family is computed in every run, what is the model's alone in slow ones:
# tests/models compares the logits of all.
QUICK = {"granite", "phi3_short", "qwen3_moe"}
NEAR_TIE, LOGPROB_ERROR = 0.001, 1e-3


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Not here: the programs are those that users run."""


def loaded(case: str) -> LoadedModel:
    source = HFModel(FIXTURES / case)
    return LoadedModel(case, source.config, pack_params(source.config, "fp32", source), character_tokenizer(), "fp32")


def make_engine(model: LoadedModel, **settings) -> Engine:
    defaults = {"kv_precision": "fp32", "kv_memory": "8MiB", "max_seq_len": 64, "max_batch_size": 4}
    return Engine(model, EngineConfig(**(defaults | settings)))


def assert_as_expected(case: str, request) -> None:
    with np.load(FIXTURES / case / "expected.npz") as expected:
        tokens, logprobs, margins = (expected[f"greedy{kind}"] for kind in ("", "_logprobs", "_margins"))
    ours = np.array(request.output_token_ids)
    differing = np.flatnonzero(ours != tokens[: len(ours)])
    alike = int(differing[0]) if len(differing) else len(ours)
    assert alike == len(ours) or margins[alike] <= NEAR_TIE, f"token {alike}: margin {margins[alike]}"
    found = [step.logprob for step in request.logprobs[:alike]]
    np.testing.assert_allclose(found, logprobs[:alike], rtol=0, atol=LOGPROB_ERROR)


def assert_prompt_as_expected(case: str, request) -> None:
    with np.load(FIXTURES / case / "expected.npz") as expected:
        tokens, logits = expected["tokens"], expected["logits"].astype(np.float64)
    logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[np.arange(len(tokens) - 1), tokens[1:]]
    found = [entry.logprob for entry in request.scores.entries]
    np.testing.assert_allclose(found, logprobs, rtol=0, atol=LOGPROB_ERROR)


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_greedy_tokens_and_their_log_probabilities_are_those_of_transformers(case):
    """The prompt alone, and cut into chunks beside another one that begins alike."""
    with np.load(FIXTURES / case / "expected.npz") as expected:
        prompt, count = expected["tokens"].tolist(), len(expected["greedy"])
    greedy = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=1)
    scored = greedy.model_copy(update={"prompt_logprobs": 0})
    engine = make_engine(loaded(case), max_chunk_tokens=16)
    for request in serve(engine, [prompt, prompt[:20], prompt], ["fp32"] * 3, scored)[::2]:
        assert_as_expected(case, request)
        assert_prompt_as_expected(case, request)
    (again,) = serve(engine, [prompt], ["fp32"], greedy)  # on the first one's pages
    assert_as_expected(case, again)
