"""/v1/embeddings, as OpenAI's client asks it: the vectors are those of `LLM.embed`."""

import asyncio
import base64
import dataclasses
import json

import numpy as np
import openai
import pytest
from serving import check_nothing_is_left, serving
from test_completions import strictly

from fineserve_jax.entrypoints.server.classes import ServiceClass
from fineserve_jax.loaders.pooling_settings import PoolingSettings
from fineserve_jax.request.request_options import RequestOptions

MEAN = {"pooling": "mean"}
HIDDEN_ERROR = 1e-5  # of vectors of length 1, which may be computed in other batches


def vectors_of(answer):
    assert [one.index for one in answer.data] == [*range(len(answer.data))]
    return np.array([one.embedding for one in answer.data], np.float32)


def expected(llm, inputs, **options):
    found = asyncio.run(llm.embed(inputs, **({"pooling": "mean", "normalize": True} | options)))
    return np.stack([one.vector for one in found]), sum(len(one.token_ids) for one in found)


@pytest.mark.parametrize("inputs", ["abc", ["abc", "de"], [70, 71, 72], [[70, 71], [72]], ["x"] * 40])
def test_inputs_of_all_forms_have_the_vectors_of_the_engine(server, llm, inputs):
    answer = strictly(server.client.embeddings.create(model="tiny", input=inputs, extra_body=MEAN))
    vectors, tokens = expected(llm, inputs)
    np.testing.assert_allclose(vectors_of(answer), vectors, atol=HIDDEN_ERROR)
    assert (answer.object, answer.model, answer.data[0].object) == ("list", "tiny", "embedding")
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (tokens, tokens)
    assert answer.model_extra["kv_precision"] == "int4"
    check_nothing_is_left(llm)


def test_numbers_and_base64_are_the_same_values_whatever_else_is_asked(server, llm):
    own = {"input": "abcdef", "pooling": "last", "normalize": False, "kv_precision": "int8", "user": "u"}
    vectors, _ = expected(llm, "abcdef", pooling="last", normalize=False, options=RequestOptions(kv_precision="int8"))
    found = {}
    for form in ("float", "base64"):
        status, headers, body = server.ask(
            "/v1/embeddings", own | {"encoding_format": form, "dimensions": vectors.size}
        )
        assert (status, headers["content-type"]) == (200, "application/json")
        found[form] = json.loads(body)["data"][0]["embedding"]
    decoded = np.frombuffer(base64.b64decode(found["base64"]), "<f4")
    np.testing.assert_allclose(decoded, vectors[0], atol=1e-4)  # of hidden states of about 1
    np.testing.assert_allclose(found["float"], decoded, atol=1e-4)
    assert abs(np.linalg.norm(decoded) - 1) > 0.01


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"input": "a"}, "unsupported_model", "'tiny' is a language model and not made for embeddings"),
        (
            {"input": "a", "dimensions": 3} | MEAN,
            "unsupported_parameter",
            "dimensions=3 is not served: vectors of 'tiny'",
        ),
        ({"input": "a", "encoding_format": "int8"} | MEAN, "invalid_request", "encoding_format"),
        ({"input": "a", "pooling": "max"}, "invalid_request", "pooling"),
        ({"input": "a", "tpot_slo_s": 1.0} | MEAN, "unsupported_parameter", "tpot_slo_s is for answers"),
        ({"input": "a", "max_tokens": 3} | MEAN, "invalid_request", "unknown field 'max_tokens'"),
        (MEAN, "invalid_request", "no input"),
        ({"input": []} | MEAN, "invalid_request", "an empty list"),
        ({"input": ["a", ""]} | MEAN, "invalid_request", "prompt 1: the prompt is empty"),
        ({"input": ["a", {"prompt": "b"}]} | MEAN, "invalid_request", "input 1 is a JSON object"),
        ({"input": 3} | MEAN, "invalid_request", "input is a JSON number"),
        ({"input": [1, 2.5]} | MEAN, "invalid_request", "2.5"),
        ({"input": [5000]} | MEAN, "invalid_request", "5000"),
        ({"input": "a" * 129} | MEAN, "invalid_request", "the prompt has 129 tokens"),
        ({"input": ["a"] * 2049} | MEAN, "invalid_request", "2049 inputs; it may have 1024"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_reason(server, body, code, message):
    status, _, answer = server.ask("/v1/embeddings", body)
    error = json.loads(answer)["error"]
    assert (status, error["code"]) == (400, code)
    assert message in error["message"]


def test_a_model_that_is_not_served_is_not_found(server):
    with pytest.raises(openai.NotFoundError, match="'other' is not served"):
        server.client.embeddings.create(model="other", input="a", extra_body=MEAN)


def test_a_server_may_say_how_hidden_states_are_pooled_and_classes_count(llm):
    classes = {"one": ServiceClass(keys=("k",), kv_precisions=("int8",), ttft_slo_s=60.0)}
    with serving(llm, classes, embedding_pooling="last") as running:
        answer = running.client_with("k").embeddings.create(model="tiny", input="abc")
        vectors, _ = expected(llm, "abc", pooling="last", options=RequestOptions(kv_precision="int8"))
        np.testing.assert_allclose(vectors_of(answer), vectors, atol=HIDDEN_ERROR)
        with pytest.raises(openai.PermissionDeniedError, match="'int4' is not this key's"):
            running.client_with("k").embeddings.create(model="tiny", input="a", extra_body={"kv_precision": "int4"})
        with pytest.raises(openai.AuthenticationError):
            running.client.embeddings.create(model="tiny", input="a")
        told = running.ask("/metrics")[2].decode()
        assert 'fineserve:slo_requests_total{met="true",slo="ttft"} 1.0' in told
        assert 'path="/v1/embeddings",status="200"' in told


def test_a_model_that_is_made_for_vectors_makes_them_as_its_files_say(server, llm, monkeypatch):
    """It needs no pooling in the request, which may name another one; and without a head it writes nothing."""
    engine = llm.engine
    made = dataclasses.replace(engine.model, pooling=PoolingSettings("last", False, has_head=False))
    monkeypatch.setitem(engine.models, "tiny", dataclasses.replace(engine.served(), model=made))
    for said in ({}, {"pooling": "mean"}, {"normalize": True}):
        answer = server.client.embeddings.create(model="tiny", input=["ab", "c"], extra_body=said)
        vectors, _ = expected(llm, ["ab", "c"], **({"pooling": "last", "normalize": False} | said))
        np.testing.assert_allclose(vectors_of(answer), vectors, atol=1e-4)  # of hidden states of about 1
    with pytest.raises(openai.BadRequestError, match="'tiny' has no output head"):
        server.client.completions.create(model="tiny", prompt="a")
