"""What an answer's text must be where a model may call tools, or must.

Calls have the form of Hermes' and Qwen's chat templates: `<tool_call>`, a line with {"name": ..., "arguments": {...}},
and `</tool_call>`; several stand one behind another, and text before the first.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fineserve_jax.errors import RequestError
from fineserve_jax.request.structured.params import JSON_OPTIONS, StructuredOutputsParams, exact_schema
from fineserve_jax.validation import shown

BEGIN, END = "<tool_call>", "</tool_call>"
NEXT, TAIL = f"\n{BEGIN}", f"}}\n{END}"
NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Names of functions, as OpenAI's API has them."""
ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}
NO_ARGUMENTS: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


def form_of_calls(
    tools: Sequence[Mapping[str, Any]], choice: str | Mapping[str, Any] = "auto", parallel: bool = True
) -> StructuredOutputsParams | None:
    """What the text must be; None where any will do.

    Args:
        tools: as OpenAI's API has them. Arguments of those that are `strict` are of their schema, those of the others
            any JSON object.
        choice: "auto", "required", or the function that must be called, as OpenAI's API has it.
        parallel: whether there may be several calls.

    Raises:
        RequestError: tools that cannot be kept to, and a choice that is none or of none of them.
    """
    functions = [_function(tool) for tool in tools]
    if choice == "auto" and parallel and not any(function.get("strict") for function in functions):
        return None
    names = [_name(place, function) for place, function in enumerate(functions)]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise RequestError(f"tools has two functions {twice[0]!r}; give each a name of its own")
    called = names if choice in ("auto", "required") else [_chosen(choice, names)]
    if not called:
        raise RequestError(f"tool_choice={shown(choice)} without tools cannot be kept to; give tools, or auto")
    schemas = {
        name: _schema(place, function)
        for place, (name, function) in enumerate(zip(names, functions, strict=True))
        if name in called
    }
    several = parallel and choice in ("auto", "required")
    try:
        return StructuredOutputsParams(grammar=_grammar(schemas, must_call=choice != "auto", several=several))
    except RequestError as error:  # of all of them together
        raise RequestError(f"tools cannot be kept to; give fewer, or simpler ones: {error}") from None


def function_names(tools: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the functions, of tools that have some."""
    return tuple(name for tool in tools if isinstance(name := _function(tool).get("name"), str))


def _function(tool: Mapping[str, Any]) -> Mapping[str, Any]:
    function = tool.get("function")
    return function if isinstance(function, Mapping) else {}


def _name(place: int, function: Mapping[str, Any]) -> str:
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(
            f"tools.{place}.function.name={shown(name)} is no name of a function; give up to 64 letters, digits, "
            "underscores and hyphens"
        )
    return name


def _chosen(choice: Any, names: Sequence[str]) -> str:
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if name is None:
        raise RequestError(
            f"tool_choice={shown(choice)} is not served; give auto, none, required, or a function such as "
            '{"type": "function", "function": {"name": "f"}}'
        )
    if name not in names:
        raise RequestError(f"tool_choice names {shown(name)}, which is none of the tools; give one of them")
    return str(name)


def _schema(place: int, function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments, in the form in which it is kept to."""
    if not function.get("strict"):
        return exact_schema(json.dumps(ANY_ARGUMENTS))
    where, schema = f"tools.{place}.function", function.get("parameters")
    if schema is None:
        schema = NO_ARGUMENTS
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise RequestError(f"{where}.parameters={shown(schema)} is no schema of an object; give one of that type")
    try:
        return exact_schema(json.dumps({**schema, "type": "object"}, allow_nan=False))
    except (RequestError, TypeError, ValueError, RecursionError) as error:
        raise RequestError(f"{where} is strict: {error}") from None


def _grammar(schemas: Mapping[str, dict[str, Any]], *, must_call: bool, several: bool) -> str:
    """In llguidance's Lark. Where there need be no call, the first one begins with whatever text is before it: that is
    lazy, so that `BEGIN` cannot be part of a text without a call."""
    more = "(NEXT body)*" if several else ""
    rules = [
        "%llguidance {}",
        f"start: FIRST body {more}" if must_call else f"start: TEXT | begun body {more}",
        f"body: ({' | '.join(f'HEAD_{index} arguments_{index}' for index in range(len(schemas)))}) TAIL",
        f"TAIL: {json.dumps(TAIL)}",
    ]
    if must_call:
        rules.append(f"FIRST: {json.dumps(BEGIN)}")
    else:
        rules += [r"TEXT: /(.|\n)*/", f"begun[lazy]: TEXT {json.dumps(BEGIN)}"]
    if several:
        rules.append(f"NEXT: {json.dumps(NEXT)}")
    for index, (name, schema) in enumerate(schemas.items()):
        head = f'\n{{"name": "{name}", "arguments": '
        guided = {**schema, "x-guidance": JSON_OPTIONS}
        rules += [f"HEAD_{index}: {json.dumps(head)}", f"arguments_{index}: %json {json.dumps(guided)}"]
    return "\n".join(rules)
