"""Tools that are called, as OpenAI's client asks for them and reads them, whole and as they come."""

import asyncio
import json

import openai
import pytest
from openai.types.chat import ChatCompletionChunk
from tiny_model import CHAT, OPTIONS, write_tiny_model

from fineserve_jax import SamplingParams
from fineserve_jax.async_llm import AsyncLLM
from fineserve_jax.loaders import ChatOptions

CITIES = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"enum": [1, 22]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": CITIES, "strict": True}}
OTHER = {"type": "function", "function": {"name": "now", "parameters": {}}}
NAMED = {"type": "function", "function": {"name": "weather"}}
MESSAGES = [{"role": "user", "content": "Hi"}]
ASKED = {"messages": MESSAGES, "model": "tiny", "max_tokens": 400, "seed": 3, "tools": [TOOL, OTHER]}


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """Its template calls tools in the usual form, and its vocabulary has what that needs."""
    template = CHAT + "{% if false %}<tool_call>{% endif %}"
    directory = write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", template, first="}")
    return AsyncLLM(str(directory), **(OPTIONS | {"kv_formats": ("int4", "int8"), "max_seq_len": 512}))


def test_a_call_that_is_demanded_comes_whole_and_streamed(server):
    asked = ASKED | {"tool_choice": NAMED, "n": 2}
    choices = server.client.chat.completions.create(**asked).choices
    chunks = [
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for chunk in server.client.chat.completions.create(**asked, stream=True)
    ]
    for choice in choices:
        (call,) = choice.message.tool_calls
        assert (choice.message.content, choice.finish_reason, call.function.name) == (None, "tool_calls", "weather")
        arguments = json.loads(call.function.arguments)
        assert arguments["city"] in ("Rome", "Oslo")
        assert arguments["days"] in (1, 22)
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(one.delta.content or "" for one in own) == ""
        (streamed,) = [called for one in own for called in one.delta.tool_calls or ()]
        assert (streamed.index, streamed.function.arguments) == (0, call.function.arguments)
        assert [one.finish_reason for one in own if one.finish_reason] == ["tool_calls"]


def test_the_same_call_is_had_in_python(llm, server):
    options = ChatOptions(tools=[TOOL], tool_choice="required", parallel_tool_calls=False)
    params = SamplingParams(max_tokens=400, seed=3, temperature=1.0)
    (output,) = asyncio.run(llm.chat(MESSAGES, params, chat_options=options))
    (sample,) = output.outputs
    assert sample.finish_reason == "stop"
    assert sample.text.startswith('<tool_call>\n{"name": "weather", "arguments": {')
    assert sample.text.endswith("}\n</tool_call>")
    asked = ASKED | {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    (choice,) = server.client.chat.completions.create(**asked).choices
    assert choice.message.tool_calls[0].function.arguments in sample.text


def test_text_that_calls_nothing_is_streamed_as_it_is(server):
    asked = ASKED | {"max_tokens": 30}
    (whole,) = server.client.chat.completions.create(**asked).choices
    pieces = [
        chunk.choices[0].delta.content or "" for chunk in server.client.chat.completions.create(**asked, stream=True)
    ]
    assert whole.message.tool_calls is None
    assert "".join(pieces) == whole.message.content
    assert len([piece for piece in pieces if piece]) > 10


def test_what_says_otherwise_is_refused(server):
    with pytest.raises(openai.BadRequestError, match="response_format, and tools whose calls are constrained"):
        server.client.chat.completions.create(**ASKED, response_format={"type": "json_object"})
