"""Gemma 3 270M, in fp32 with an fp32 cache, says what Hugging Face transformers says of the same weights.

`fixtures/make_gemma_fixture.py` made the expected tokens; they may differ where the two best logits of transformers are
within 0.001 of each other, and what follows such a token is not compared. Two of the prompts outgrow the window.
"""

import json
from pathlib import Path

import pytest

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.loaders import load_model
from fineserve_jax.request.sampling_params import SamplingParams

pytestmark = [pytest.mark.real_model, pytest.mark.slow]

NEAR_TIE = 0.001
FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "gemma3_greedy.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def _compiled_quickly():
    """Not here: the programs are those that users run."""


@pytest.fixture(scope="module")
def engine() -> Engine:
    settings = {"kv_precision": "fp32", "kv_formats": ("fp32",), "kv_memory": "256MiB", "max_batch_size": 8}
    return Engine(load_model("gemma3-270m", "fp32"), EngineConfig(**settings))


def test_greedy_tokens_equal_those_of_transformers(engine):
    assert sum(len(row["prompt_token_ids"]) > engine.model.config.sliding_window for row in FIXTURE["prompts"]) == 2
    sampling = SamplingParams(max_tokens=FIXTURE["new_tokens"], ignore_eos=True)
    requests = [engine.add_request(row["prompt_token_ids"], sampling) for row in FIXTURE["prompts"]]
    while engine.has_unfinished:
        engine.step()
    for row, request in zip(FIXTURE["prompts"], requests, strict=True):
        pairs = zip(request.output_token_ids, row["token_ids"], row["margins"], strict=True)
        margin = next((margin for ours, theirs, margin in pairs if ours != theirs), 0.0)
        assert margin <= NEAR_TIE, row["text"]


def test_texts_are_tokenized_as_by_transformers(engine):
    for row in FIXTURE["texts"]:
        assert engine.tokenizer.encode(row["text"], add_special_tokens=False) == row["ids"], row["text"]
    for row in FIXTURE["prompts"]:
        assert engine.tokenizer.encode(row["text"]) == row["prompt_token_ids"], row["text"]
