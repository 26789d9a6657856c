"""Calls of tools in what a model wrote, see `structured.tool_calls`: taken out of the text, whole or as it comes."""

import json
import re
from collections.abc import Collection
from typing import Any, NamedTuple

from fineserve_jax.request.structured.tool_calls import BEGIN, END

OPENING = re.compile(re.escape(BEGIN) + r"\s*\{\s*")
KEY = re.compile(r'"(name|arguments)"\s*:\s*')
COMMA = re.compile(r"\s*,\s*")
CLOSING = re.compile(r"\s*\}\s*" + re.escape(END))


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


class Call(NamedTuple):
    """A call.

    Attributes:
        name: of the function.
        arguments: a JSON object, as the model wrote it.
    """

    name: str
    arguments: str


def find_calls(text: str, names: Collection[str]) -> tuple[str, list[Call]]:
    """Takes the calls out of a text.

    Args:
        names: of the functions that may be called. What calls another, or is no call, stays text.

    Returns:
        what stands around the calls, without white space at its end; all of the text if there are none.
    """
    calls, around, told = list[Call](), list[str](), 0
    start = text.find(BEGIN)
    while start >= 0:
        found = _call_at(text, start, names)
        if found is None:
            start = text.find(BEGIN, start + 1)
            continue
        call, end = found
        calls.append(call)
        around.append(text[told:start])
        told, start = end, text.find(BEGIN, end)
    return ("".join([*around, text[told:]]).rstrip(), calls) if calls else (text, calls)


def _call_at(text: str, start: int, names: Collection[str]) -> tuple[Call, int] | None:
    """The call that begins at `start`, and where it ends; None: none does. Its two members may come in any order."""
    values, spans = dict[str, Any](), dict[str, str]()
    mark = OPENING.match(text, start)
    while mark is not None and (key := KEY.match(text, mark.end())) is not None:
        try:
            values[key[1]], end = _DECODER.raw_decode(text, key.end())
        except (ValueError, RecursionError):  # ValueError: also a number of thousands of digits
            return None
        spans[key[1]] = text[key.end() : end]
        mark = COMMA.match(text, end)
        if len(values) == 2 and (closing := CLOSING.match(text, end)) is not None:
            name = values["name"]
            is_call = isinstance(name, str) and name in names and isinstance(values["arguments"], dict)
            return (Call(name, spans["arguments"]), closing.end()) if is_call else None
    return None


def calls_message(calls: Collection[Call], token: str, index: int) -> list[dict[str, Any]]:
    """Calls as a message has them.

    Args:
        token: of the answer.
        index: of the choice. With the token it makes ids that no other call has.
    """
    return [
        {
            "id": f"call_{token}_{index}_{place}",
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }
        for place, call in enumerate(calls)
    ]


class TextBeforeCalls:
    """A text as it comes, of which no more is given out than stands before its first call.

    Args:
        names: of the functions that may be called.
    """

    def __init__(self, names: Collection[str]) -> None:
        self._names, self._held = names, ""

    def add(self, piece: str) -> str:
        """What can be given out with this piece: what may belong to a call, or be white space before one, is held."""
        text = self._held + piece
        end = text.find(BEGIN)
        if end < 0:
            end = len(text) - next(size for size in range(len(BEGIN) - 1, -1, -1) if text.endswith(BEGIN[:size]))
        end = len(text[:end].rstrip())
        self._held = text[end:]
        return text[:end]

    def end(self) -> tuple[str, list[Call]]:
        """What was held: text, and the calls."""
        return find_calls(self._held, self._names)
