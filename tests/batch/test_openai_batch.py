"""Requests of OpenAI's batch API: taken as OpenAI's client writes them, answered as it reads them."""

import json

import pytest
from job_cases import by_id, run_job, written
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.shared import ErrorObject
from stub_engine import TOKENIZER, StubEngine

from fineserve_jax import RequestError
from fineserve_jax.engine.outputs import CompletionOutput, RequestMetrics, RequestOutput
from fineserve_jax.entrypoints.batch import run_batch
from fineserve_jax.entrypoints.batch.answer_rows import AnswerRows
from fineserve_jax.entrypoints.batch.records import Record
from fineserve_jax.entrypoints.batch.requests import RowRequests
from fineserve_jax.entrypoints.batch.rows import BadRow, BatchRow, parse_row
from fineserve_jax.entrypoints.openai_api.bodies import API_DEFAULTS

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": [{"type": "text", "text": "Hi"}]}]


def chat(custom_id="a", **body):
    body = {"model": "stub", "messages": MESSAGES, "max_tokens": 5} | body
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id="b", **body):
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": {"prompt": "abc"} | body}


def parsed(row):
    return parse_row(Record(1, json.dumps(row).encode()))


def sampling(row, **defaults):
    found = parsed(row)
    assert isinstance(found, BatchRow), found
    return RowRequests(defaults).sampling(found)


@pytest.fixture
def answers(tmp_path):
    """The answers to rows, by custom_id."""

    def answer(*rows):
        run_job(StubEngine(), rows, tmp_path / "out.jsonl", {"max_tokens": 4})
        found = written(tmp_path / "out.jsonl")
        for row in found:
            assert set(row) == {"id", "custom_id", "response", "error"}
            assert set(row["response"]) == {"status_code", "request_id", "body"}
        assert len({row["id"] for row in found}) == len(found)
        return {row["custom_id"]: row for row in found}

    return answer


def strictly(kind, body):
    """The body as OpenAI's type, to which nothing is missing and every value is of its type."""
    return kind.model_validate(body, strict=True)


def test_a_chat_completion_is_one_to_openais_client(answers):
    row = answers(chat(n=2, logprobs=True, top_logprobs=1, temperature=0.5, seed=-3, user="me"))["a"]
    assert (row["error"], row["response"]["status_code"]) == (None, 200)
    body = strictly(ChatCompletion, row["response"]["body"])
    assert (body.object, body.model, len(body.choices)) == ("chat.completion", "stub", 2)
    assert body.usage.total_tokens == body.usage.prompt_tokens + body.usage.completion_tokens
    assert body.usage.completion_tokens == 10
    for number, choice in enumerate(body.choices):
        assert (choice.index, choice.finish_reason, choice.message.role) == (number, "length", "assistant")
        assert "".join(entry.token for entry in choice.logprobs.content) == choice.message.content
        assert bytes(choice.logprobs.content[0].bytes).decode() == choice.logprobs.content[0].token
        assert choice.logprobs.content[0].top_logprobs[0].logprob == choice.logprobs.content[0].logprob < 0
    assert body.choices[0].message.content != body.choices[1].message.content
    assert body.model_extra["kv_tokens"] == {"bf16": 2 * (body.usage.prompt_tokens + 5 - 1)}
    assert body.model_extra["timing"]["attempts"] == 1


def test_a_completion_is_one_to_openais_client(answers):
    rows = answers(completion(logprobs=1, max_tokens=3, stop=["zz"]), completion("c", prompt=["abc"], max_tokens=3))
    body = strictly(Completion, rows["b"]["response"]["body"])
    (choice,) = body.choices
    assert (body.object, choice.finish_reason, body.usage.prompt_tokens) == ("text_completion", "length", 3)
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.text_offset == [0, 1, 2]
    assert [max(top.values()) for top in choice.logprobs.top_logprobs] == choice.logprobs.token_logprobs
    assert strictly(Completion, rows["c"]["response"]["body"]).choices[0].logprobs is None


def test_a_request_is_sampled_as_openai_would_unless_it_or_the_job_says_otherwise():
    assert API_DEFAULTS["completions"] == {"temperature": 1.0, "max_tokens": 16}
    assert (sampling(chat(max_tokens=None)).temperature, sampling(chat(max_tokens=None)).max_tokens) == (1.0, None)
    assert (sampling(completion()).temperature, sampling(completion()).max_tokens) == (1.0, 16)
    assert sampling(completion(), temperature=0.3, max_tokens=7).temperature == 0.3
    assert sampling(completion(temperature=None), temperature=0.3).temperature == 0.3
    assert sampling(completion(temperature=0, max_tokens=2), temperature=0.3, max_tokens=7).max_tokens == 2
    assert sampling(chat(max_completion_tokens=9, max_tokens=None)).max_tokens == 9
    assert sampling(chat(seed=-1)).seed == 2**32 - 1
    assert sampling(chat(logit_bias={"5": -100})).logit_bias == {5: -100.0}


def test_a_response_format_is_honoured():
    wanted = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "integer"}, "strict": True}}
    assert sampling(chat(response_format=wanted)).structured_outputs.json_schema == json.dumps({"type": "integer"})
    assert sampling(chat(response_format={"type": "text"})).structured_outputs is None


def test_fields_of_plain_rows_are_taken_too():
    row = parsed(chat(kv_precision="int8", priority=3, tenant="alice", ttft_slo_s=2, top_k=5))
    assert (row.options.kv_precision, row.options.priority, row.options.tenant) == ("int8", 3, "alice")
    assert row.form == "chat"


@pytest.mark.parametrize(
    "harmless",
    [
        {"user": "x"},
        {"metadata": {"a": "b"}},
        {"service_tier": "flex"},
        {"store": False},
        {"stream": False},
        {"response_format": {"type": "text"}},
        {"modalities": ["text"]},
        {"parallel_tool_calls": True},
        {"parallel_tool_calls": False, "tool_choice": "none"},
        {"functions": None, "stream_options": None},
    ],
)
def test_what_changes_nothing_is_taken(harmless):
    row = parsed(chat(**harmless))
    assert isinstance(row, BatchRow)
    assert row.chat.tools is None


@pytest.mark.parametrize(
    ("row", "error", "code"),
    [
        (chat(stream=True), "stream=True is not served: a batch writes whole answers", "unsupported_parameter"),
        (chat(tool_choice="required"), "tool_choice='required' without tools cannot be kept to", "invalid_request"),
        (chat(functions=[]), r"functions=\[\] is not served: give tools", "unsupported_parameter"),
        (chat(store=True), "store=True is not served", "unsupported_parameter"),
        (chat(reasoning_effort="low"), "unknown field 'reasoning_effort'", "invalid_request"),
        (chat(prompt="abc"), "prompt is for /v1/completions; give messages", "invalid_request"),
        (chat(messages=None), "neither prompt nor messages", "invalid_request"),
        (chat(id="x"), "unknown field 'id'", "invalid_request"),
        (completion(messages=MESSAGES), "messages are for /v1/chat/completions", "invalid_request"),
        (completion(prompt=["a", "b"]), "has 2 prompts; give each a request of its own", "invalid_request"),
        (completion(echo="yes"), "echo='yes' is neither true nor false", "invalid_request"),
        (chat(echo=True), "echo is for /v1/completions; leave it out", "unsupported_parameter"),
        (completion(best_of=3), "best_of=3 is not served", "invalid_request"),
        (completion(suffix="x"), "suffix='x' is not served", "unsupported_parameter"),
        (chat() | {"url": "/v1/embeddings"}, "url='/v1/embeddings' is not served", "invalid_url"),
        (chat() | {"url": {"a": 1}}, "url={'a': 1} is not served", "invalid_url"),
        (chat() | {"method": "GET"}, "method='GET' is not served", "invalid_method"),
        (chat() | {"body": "x"}, "body is a JSON string", "invalid_request"),
        (chat() | {"extra": 1}, "unknown field 'extra'; a request has: custom_id", "invalid_request"),
        (chat(None), "custom_id is missing or no text", "missing_custom_id"),
        (chat(5), "custom_id is missing or no text", "missing_custom_id"),
    ],
)
def test_what_cannot_be_honoured_is_refused_for_that_request(row, error, code):
    bad = parsed(row)
    assert isinstance(bad, BadRow)
    assert bad.code == code
    with pytest.raises(ValueError, match=error):
        raise ValueError(bad.error)


def test_requests_that_fail_are_errors_to_openais_client_and_the_others_are_answered(answers):
    rows = answers(
        chat("good"),
        chat("bad", temperature=7000),
        chat("other", model="gpt-5"),
        completion("late one", max_tokens=2),
    )
    assert rows["late one"]["error"] is None
    errors = [rows["bad"], rows["other"]]
    for row, message in zip(errors, ("temperature=7000: ", "model='gpt-5' is not served"), strict=True):
        assert row["response"]["status_code"] == 400
        error = strictly(ErrorObject, row["response"]["body"]["error"])
        assert error.message.startswith(message)
        assert (row["error"]["code"], row["error"]["message"]) == (error.code, error.message)
    assert (rows["bad"]["error"]["line"], rows["other"]["error"]["line"]) == (2, 3)


def test_lines_that_cannot_be_read_are_errors_in_the_form_of_the_file(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_bytes(json.dumps(chat("x")).encode() + b'\n{"custom_id": "torn\n' + json.dumps(chat("x")).encode())
    summary = run_batch("stub", source, target, make_engine=StubEngine)
    errors = [row["error"] for row in written(target) if row["error"] is not None]
    assert {error["line"]: error["code"] for error in errors} == {2: "invalid_line", 3: "duplicate_id"}
    assert (summary.answered, summary.error_kinds) == (1, {"invalid_line": 1, "duplicate_id": 1})
    assert summary.errors == 2


def test_plain_rows_beside_requests_are_answered_plainly(tmp_path):
    run_job(StubEngine(), [chat("x"), {"id": "y", "prompt": "abc"}], tmp_path / "out.jsonl", {"max_tokens": 2})
    plain = by_id([row for row in written(tmp_path / "out.jsonl") if "response" not in row])
    assert set(plain) == {"y"}


def test_calls_of_tools_are_told_as_openai_tells_them():
    tools = [{"type": "function", "function": {"name": "f"}}]
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1.0}}\n</tool_call>'
    texts = [(f"Hm\n{call}\n{call}", "stop"), (call, "length"), (call.replace("f", "g", 1), "stop")]
    samples = [CompletionOutput(index, text, [1], None, reason) for index, (text, reason) in enumerate(texts)]
    output = RequestOutput("r", None, [4], "stub", "bf16", {}, samples, RequestMetrics(0.0, 0.0, 0.0, 0))

    def told(**fields):
        body = AnswerRows().answer(parsed(chat(**fields)), output, TOKENIZER)["response"]["body"]
        return strictly(ChatCompletion, body).choices

    both, cut, other = told(tools=tools)
    assert (both.message.content, both.finish_reason, len(both.message.tool_calls)) == ("Hm", "tool_calls", 2)
    assert (cut.message.content, cut.finish_reason, len(cut.message.tool_calls)) == (None, "length", 1)
    assert (other.message.content, other.finish_reason, other.message.tool_calls) == (texts[2][0], "stop", None)
    calls = [*both.message.tool_calls, *cut.message.tool_calls]
    assert {(one.type, one.function.name, one.function.arguments) for one in calls} == {("function", "f", '{"a": 1.0}')}
    assert len({one.id for one in calls}) == 3
    assert [choice.message.content for choice in told(tools=tools, tool_choice="none")] == [text for text, _ in texts]


def test_calls_are_constrained_where_tools_are_strict_or_must_be_called():
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}}
    tool, strict = ({"type": "function", "function": {**function, "strict": strict}} for strict in (False, True))
    assert sampling(chat(tools=[tool])).structured_outputs is None
    grammars = [
        sampling(chat(**fields)).structured_outputs.grammar
        for fields in ({"tools": [strict]}, {"tools": [tool], "tool_choice": "required"})
    ]
    assert len(set(grammars)) == 2
    with pytest.raises(RequestError, match="response_format, and tools whose calls are constrained"):
        sampling(chat(tools=[strict], response_format={"type": "json_object"}))
    unlike = {**function, "strict": True, "parameters": {"properties": {"a": {"uniqueItems": True}}}}
    bad = parsed(chat(tools=[{"type": "function", "function": unlike}]))
    assert isinstance(bad, BadRow)
    assert "tools.0.function is strict: the JSON schema cannot be kept to at #/properties/a/uniqueItems" in bad.error
