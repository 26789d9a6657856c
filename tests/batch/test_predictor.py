"""The class that pipelines hand to `map_batches`, called by hand."""

import functools
import json

import numpy as np
import pytest
from stub_engine import StubEngine, next_token

from fineserve_jax import RequestError
from fineserve_jax.entrypoints.batch.predictor import FineServePredictor


@pytest.fixture
def predictor() -> FineServePredictor:
    return FineServePredictor(make_engine=functools.partial(StubEngine, 4), sampling={"max_tokens": 5})


def expected(tokenizer, prompt: str, count: int, seed: int = 0) -> str:
    tokens = tokenizer.encode(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokenizer.decode(tokens[-count:])


def test_columns_of_answers_are_added_and_others_stay(predictor):
    prompts = [f"prompt {i}" for i in range(20)]
    label = np.arange(20) / 3
    batch = {"prompt": np.array(prompts, object), "label": label, "id": np.zeros(20, int), "max_tokens": [3] * 20}
    found = predictor(batch)
    assert found["prompt"].tolist() == prompts
    assert found["label"].tolist() == label.tolist()
    assert found["output_tokens"].tolist() == [3] * 20
    assert found["text"].tolist() == [expected(predictor.engine.tokenizer, prompt, 3) for prompt in prompts]
    assert found["error"].tolist() == [None] * 20
    whole = json.loads(found["answer"][7])
    assert whole["text"] == found["text"][7]
    assert "id" not in whole


def test_a_bad_row_costs_the_others_nothing(predictor):
    found = predictor({"prompt": ["a", "b", None, "d"], "temperature": [0.0, -1.0, 0.0, None]})
    assert [error is None for error in found["error"]] == [True, False, False, True]
    assert "temperature=-1.0" in found["error"][1]
    assert "neither prompt nor messages" in found["error"][2]
    assert found["text"][1] is None
    assert found["answer"][1] is None
    assert found["output_tokens"].tolist() == [5, None, None, 5]


def test_cells_may_be_numpys(predictor):
    stop = np.array([1, 2])
    found = predictor({"prompt": np.array(["a"]), "stop_token_ids": [stop], "n": np.array([2]), "seed": np.array([3])})
    assert found["error"].tolist() == [None]
    assert len(json.loads(found["answer"][0])["samples"]) == 2
    assert found["text"][0] == json.loads(found["answer"][0])["samples"][0]["text"]


def test_batch_after_batch_is_answered_by_one_engine(predictor):
    engine = predictor.engine
    first, again = predictor({"prompt": ["a", "b"]}), predictor({"prompt": ["a", "b"]})
    assert predictor.engine is engine
    assert first["text"].tolist() == again["text"].tolist()
    assert predictor({"prompt": np.array([], object)})["text"].tolist() == []


def test_bad_sampling_is_refused_before_a_model_is_loaded():
    def never():
        raise AssertionError

    with pytest.raises(RequestError, match="temperature=-1"):
        FineServePredictor(make_engine=never, sampling={"temperature": -1})
