"""The messages of a conversation: checked, and put into the form that a template takes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fineserve_jax.errors import RequestError

Message = Mapping[str, Any]


def check_messages(messages: Sequence[Message]) -> None:
    """Raises `RequestError` for messages that no template could take, naming the first."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise RequestError(
            f"messages must be a list of {{'role': ..., 'content': ...}} objects, got {type(messages).__name__}"
        )
    if not messages:
        raise RequestError("messages is empty; give at least one")
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise RequestError(
                f"message {index} is a {type(message).__name__}, expected an object with role and content"
            )
        if not isinstance(message.get("role"), str) or not message["role"]:
            raise RequestError(f"message {index} has the role {message.get('role')!r}, expected text such as 'user'")
        _check_content(index, message)
        _check_tool_calls(index, message.get("tool_calls"))


def with_text(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its text parts joined by line ends."""
    return {**message, "content": _text_of(message)} if isinstance(message.get("content"), list) else message


def with_parsed_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """The message with arguments of its tool calls as objects, where they are text that holds one."""
    if not message.get("tool_calls"):
        return message
    return {**message, "tool_calls": [_parsed_call(call) for call in message["tool_calls"]]}


def cut_after(text: str, message: Message) -> str:
    """The text up to the end of the final message's content, as it was rendered."""
    content = message.get("content")
    said = content[-1]["text"] if isinstance(content, list) and content else _text_of(message)
    place = text.rfind(said.strip())
    if place < 0 or not said.strip():
        raise RequestError(
            "the final message cannot be continued: the chat template does not render its content as it is; leave "
            "continue_final_message out"
        )
    # A template may trim content or keep it: what is kept of the white space at its end belongs to it.
    end = place + len(said.strip())
    kept = said[len(said.rstrip()) :]
    return text[: end + len(kept)] if text.startswith(kept, end) else text[:end]


def _check_content(index: int, message: Message) -> None:
    content = message.get("content")
    if isinstance(content, str) or (content is None and message.get("tool_calls")):
        return
    if not isinstance(content, list):
        raise RequestError(f"message {index} has content of type {type(content).__name__}, expected text")
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise RequestError(
                f"message {index} has content of type list with the part {str(part)[:80]!r}; expected text, or parts "
                'such as {"type": "text", "text": "Hello"}: other kinds cannot be read by this model'
            )


def _check_tool_calls(index: int, calls: Any) -> None:
    if calls is None:
        return
    if not isinstance(calls, list) or not all(isinstance(call, Mapping) for call in calls):
        raise RequestError(f"message {index} has tool_calls of type {type(calls).__name__}, expected a list of objects")
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(
                f"message {index} has the tool call {str(call)[:80]!r}; expected an object such as "
                '{"type": "function", "function": {"name": "f", "arguments": {}}}'
            )


def _text_of(message: Message) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def _parsed_call(call: Message) -> dict[str, Any]:
    function = call.get("function")
    if function is None:
        return {**call, "arguments": _parsed(call.get("arguments"))} if "arguments" in call else dict(call)
    return {**call, "function": {**function, "arguments": _parsed(function.get("arguments", {}))}}


def _parsed(arguments: Any) -> Any:
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
