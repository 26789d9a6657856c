"""The endpoints, as OpenAI's client asks them and as it reads their answers."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from serving import eventually, serving

from fineserve_jax import SamplingParams
from fineserve_jax.request.request_options import RequestOptions

MESSAGES = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
CHAT = {"messages": MESSAGES, "model": "tiny", "max_tokens": 12, "seed": 5}
TEXT = {"prompt": "abc", "model": "tiny", "max_tokens": 12, "seed": 5}
TWO = ["ab", [70, 71, 72]]
SCHEMA = {"type": "array", "items": {"enum": [1, 22]}, "minItems": 2, "maxItems": 3}


def strictly(answer):
    """The answer as OpenAI's type, to which nothing is missing and every value is of its type."""
    return type(answer).model_validate(answer.model_dump(), strict=True)


def told(chunks, index=0):
    """What a streamed chat says in one of its choices, and how it ends."""
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    text = "".join(choice.delta.content or "" for choice in choices)
    (reason,) = [choice.finish_reason for choice in choices if choice.finish_reason]
    return text, reason


# -- chat completions -------------------------------------------------------------------------------------------


def test_a_chat_is_answered_as_the_engine_answers_it(server, llm):
    body = strictly(server.client.chat.completions.create(**CHAT, extra_body={"kv_precision": "int8"}))
    (output,) = asyncio.run(
        llm.chat(MESSAGES, SamplingParams(max_tokens=12, seed=5, temperature=1.0), RequestOptions(kv_precision="int8"))
    )
    (choice,) = body.choices
    assert (choice.message.content, choice.finish_reason) == (output.outputs[0].text, output.outputs[0].finish_reason)
    assert (body.object, body.model, choice.message.role) == ("chat.completion", "tiny", "assistant")
    assert body.usage.prompt_tokens == len(output.prompt_token_ids)
    assert body.usage.completion_tokens == len(output.outputs[0].token_ids)
    assert body.model_extra["kv_precision"] == "int8"
    assert body.model_extra["kv_tokens"] == output.kv_tokens
    assert set(body.model_extra["timing"]) == {"queue_s", "ttft_s", "total_s", "num_preemptions"}


@pytest.mark.parametrize("fields", [{}, {"n": 3}, {"logprobs": True, "top_logprobs": 2}, {"stop": ["q", "xy"]}])
def test_a_streamed_chat_says_what_a_whole_one_says(server, fields):
    whole = server.client.chat.completions.create(**CHAT, **fields)
    stream = server.client.chat.completions.create(
        **CHAT, **fields, stream=True, stream_options={"include_usage": True}
    )
    chunks = [ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True) for chunk in stream]
    assert len({(chunk.id, chunk.created, chunk.model, chunk.object) for chunk in chunks}) == 1
    assert [choice.index for chunk in chunks for choice in chunk.choices if choice.delta.role] == [
        *range(len(whole.choices))
    ]
    for choice in whole.choices:
        assert told(chunks, choice.index) == (choice.message.content, choice.finish_reason)
        entries = [
            entry
            for chunk in chunks
            for part in chunk.choices
            if part.index == choice.index and part.logprobs
            for entry in part.logprobs.content
        ]
        assert entries == (choice.logprobs.content if choice.logprobs else [])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].model_extra["kv_tokens"] == whole.model_extra["kv_tokens"]


def test_text_comes_token_by_token(server):
    chunks = list(server.client.chat.completions.create(**CHAT | {"max_tokens": 40}, stream=True))
    assert len([chunk for chunk in chunks if chunk.choices[0].delta.content]) > 10
    assert all(chunk.usage is None for chunk in chunks)


def test_an_answer_has_the_form_that_is_asked_for(server):
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}
    for seed in range(3):
        body = server.client.chat.completions.create(**CHAT | {"max_tokens": 60, "seed": seed}, response_format=wanted)
        found = json.loads(body.choices[0].message.content)
        assert 2 <= len(found) <= 3
        assert set(found) <= {1, 22}


def test_tools_reach_the_template(llm):
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    own = {"chat_template": "{{ tools | length }}{{ messages[0].content }}"}
    with serving(llm, own_chat_templates=True) as server:
        one = server.client.chat.completions.create(**CHAT, tools=[tool], extra_body=own)
        none = server.client.chat.completions.create(**CHAT, tools=[tool], tool_choice="none")
    assert one.usage.prompt_tokens == len("1Hi")
    assert none.usage.prompt_tokens == len("<user>Hi\n<assistant>")


def test_many_clients_are_answered_together_each_as_if_alone(server):
    def ask(seed):
        body = server.client.completions.create(**TEXT | {"seed": seed, "prompt": f"client {seed % 7}"})
        return body.choices[0].text

    alone = [ask(seed) for seed in range(12)]
    steps = asyncio.run(server.llm.stats()).num_steps
    with ThreadPoolExecutor(12) as clients:
        assert list(clients.map(ask, range(12))) == alone
    assert asyncio.run(server.llm.stats()).num_steps - steps < 12 * 12


# -- completions ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{}, {"n": 2, "logprobs": 1}, {"prompt": TWO, "n": 2, "logprobs": 0}])
def test_a_streamed_completion_says_what_a_whole_one_says(server, fields):
    whole = strictly(server.client.completions.create(**TEXT | fields))
    chunks = list(server.client.completions.create(**TEXT | fields, stream=True))
    num_prompts = len(fields.get("prompt", "x"))
    assert [choice.index for choice in whole.choices] == [*range(num_prompts * fields.get("n", 1))]
    for choice in whole.choices:
        parts = [part for chunk in chunks for part in chunk.choices if part.index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason
        if choice.logprobs:
            assert [t for part in parts if part.logprobs for t in part.logprobs.tokens] == choice.logprobs.tokens
            offsets = [at for part in parts if part.logprobs for at in part.logprobs.text_offset]
            assert offsets == choice.logprobs.text_offset


def test_several_prompts_are_answered_in_their_order(server):
    prompts = ["one", "two", "three"]
    body = server.client.completions.create(**TEXT | {"prompt": prompts})
    alone = [server.client.completions.create(**TEXT | {"prompt": prompt}) for prompt in prompts]
    assert [choice.text for choice in body.choices] == [one.choices[0].text for one in alone]
    assert body.usage.completion_tokens == sum(one.usage.completion_tokens for one in alone)


def test_answers_begin_with_their_prompts_where_that_is_asked_for(server):
    """With log-probabilities of the prompt's tokens, but of the first; nothing is added with `max_tokens` 0."""
    whole = server.client.completions.create(**TEXT | {"prompt": TWO}, echo=True, logprobs=1, temperature=0)
    alone = server.client.completions.create(**TEXT | {"prompt": TWO}, logprobs=1, temperature=0)
    for choice, added, prompt in zip(
        whole.choices, alone.choices, ("ab", server.llm.tokenizer.decode(TWO[1])), strict=True
    ):
        assert choice.text == prompt + added.text
        assert "".join(choice.logprobs.tokens) == choice.text
        assert choice.logprobs.token_logprobs[0] is None
        assert all(logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])
    scored = server.client.completions.create(**TEXT | {"max_tokens": 0}, echo=True, logprobs=0)
    assert (scored.choices[0].text, scored.usage.completion_tokens) == ("abc", 0)
    with pytest.raises(openai.BadRequestError, match="echo with stream is not served"):
        server.client.completions.create(**TEXT, echo=True, stream=True)


def test_what_a_request_leaves_open_is_as_in_openais_api_or_as_the_server_was_told(server, llm):
    body = server.client.completions.create(prompt="abc", model="tiny", extra_body={"ignore_eos": True})
    assert body.usage.completion_tokens == 16


# -- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "kind", "code", "message"),
    [
        (
            {"model": "gpt-5"},
            openai.NotFoundError,
            "model_not_found",
            "'gpt-5' is not served; choose one of tiny",
        ),
        ({"temperature": 7000}, openai.BadRequestError, "invalid_request", "temperature=7000: "),
        ({"messages": []}, openai.BadRequestError, "invalid_request", "messages"),
        ({"tool_choice": "required"}, openai.BadRequestError, "invalid_request", "tool_choice='required'"),
        (
            {"extra_body": {"chat_template": "{{ 1 }}"}},
            openai.PermissionDeniedError,
            "unsupported_parameter",
            "--own-chat",
        ),
        ({"store": True}, openai.BadRequestError, "unsupported_parameter", "store=True is not served"),
        ({"extra_body": {"kv_precision": "int5"}}, openai.BadRequestError, "invalid_request", "int5"),
        (
            {"extra_body": {"kv_precison": "int8"}},
            openai.BadRequestError,
            "invalid_request",
            "unknown field",
        ),
        ({"extra_body": {"drop_when_late": True}}, openai.BadRequestError, "invalid_request", "give ttft_slo_s"),
        ({"stream_options": {"include_usage": True}}, openai.BadRequestError, "invalid_request", "without stream"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, openai.BadRequestError, "invalid_request", "128"),
    ],
)
def test_what_cannot_be_honoured_is_refused_in_openais_form(server, fields, kind, code, message):
    with pytest.raises(kind) as refused:
        server.client.chat.completions.create(**CHAT | fields)
    assert refused.value.code == code
    assert message in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_is_dropped_when_late_is_told_so(server, stream):
    late = {"ttft_slo_s": 1e-9, "drop_when_late": True}
    with pytest.raises(openai.APIError, match="not there in time") as error:
        list(server.client.chat.completions.create(**CHAT, stream=stream, extra_body=late))
    assert error.value.code == "late"


@pytest.mark.parametrize(
    ("body", "status", "code", "message"),
    [
        (b"", 400, "invalid_json", "the body is not JSON"),
        (b"[1]", 400, "invalid_json", "a JSON list"),
        (b'{"prompt": "\xff"}', 400, "invalid_json", "not UTF-8"),
        (b'{"prompt": NaN}', 400, "invalid_json", "NaN is no JSON value"),
        (b'{"prompt": ' + b"[" * 100_000, 400, "invalid_json", "not JSON"),
        (b'{"prompt": "a", "seed": ' + b"9" * 5000 + b"}", 400, "invalid_json", "not JSON"),
        (b'{"prompt": "a", "model": "\\ud800"}', 404, "model_not_found", "\\ud800"),
        (b'{"prompt": ["a", "b"], "n": 100}', 400, "invalid_request", "at most 128"),
        (b'{"prompt": "a", "stream": 1}', 400, "invalid_request", "stream=1 is neither true nor false"),
    ],
    ids=range(9),
)
def test_bodies_that_are_none_are_refused(server, body, status, code, message):
    found, headers, answer = server.ask("/v1/completions", body)
    error = json.loads(answer)["error"]
    assert (found, headers["content-type"], error["code"]) == (status, "application/json", code)
    assert message in error["message"]


def test_paths_and_methods_that_are_none_are_refused_in_openais_form(server):
    status, _, answer = server.ask("/v1/images/generations", {})
    assert (status, json.loads(answer)["error"]["code"]) == (404, "not_found")
    status, headers, answer = server.ask("/v1/completions")
    assert (status, headers["allow"], json.loads(answer)["error"]["code"]) == (405, "POST", "method_not_allowed")


# -- besides completions -----------------------------------------------------------------------------------------


def test_models_are_told(server):
    (model,) = server.client.models.list().data
    assert (model.id, model.object) == ("tiny", "model")
    assert model.model_extra["max_model_len"] == 128
    assert model.model_extra["kv_precisions"] == ["int4", "int8"]
    assert server.client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError):
        server.client.models.retrieve("other/one")


def test_prompts_and_messages_are_tokenized_as_they_would_be_answered(server):
    for fields in ({"prompt": "a b"}, {"messages": MESSAGES, "model": "tiny"}):
        status, _, answer = server.ask("/tokenize", fields)
        found = json.loads(answer)
        expected = server.ask("/v1/completions" if "prompt" in fields else "/v1/chat/completions", fields)
        assert status == 200
        assert found["count"] == len(found["tokens"]) == json.loads(expected[2])["usage"]["prompt_tokens"]
    assert server.llm.tokenizer.decode(found["tokens"]) == "<user>Hi\n<assistant>"
    assert server.ask("/tokenize", {"prompt": "a", "temperature": 1})[0] == 400


def samples(server):
    """What /metrics tells, by name and labels."""
    status, _, answer = server.ask("/metrics")
    assert status == 200
    lines = [line for line in answer.decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_are_those_of_vllm_where_it_has_them(server):
    before = samples(server)
    server.client.completions.create(**TEXT, extra_body={"ttft_slo_s": 1e-9, "tpot_slo_s": 1000.0})
    eventually(lambda: samples(server)["vllm:generation_tokens_total"] == before["vllm:generation_tokens_total"] + 12)
    now = samples(server)
    for name in (
        'fineserve:slo_requests_total{met="false",slo="ttft"}',
        'fineserve:slo_requests_total{met="true",slo="tpot"}',
        'vllm:time_to_first_token_seconds_count{model_name="tiny"}',
        'vllm:request_success_total{finished_reason="length",model_name="tiny"}',
        'fineserve:http_responses_total{path="/v1/completions",status="200"}',
    ):
        assert now[name] - before.get(name, 0.0) == 1.0, name
    assert now["vllm:num_requests_running"] == now["vllm:num_requests_waiting"] == 0.0
    assert now["fineserve:predicted_wait_seconds"] == 0.0
    assert server.ask("/health")[0] == 200
