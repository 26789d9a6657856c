"""Requests of OpenAI's batch API as rows: {"custom_id", "method", "url", "body"}.

Fields of the body are those of the endpoint, of which each is honoured or refused, and besides them any field that a
plain row may have, such as `kv_precision`. Form and meaning as in OpenAI's reference of the batch API, of chat
completions and of completions.
"""

from collections.abc import Callable, Mapping
from typing import Any

from fineserve_jax.batch.row_fields import Form, RowError
from fineserve_jax.sampling_params import MAX_SEED
from fineserve_jax.validation import json_kind, shown

ENDPOINTS: dict[str, Form] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}
ENVELOPE = ("custom_id", "method", "url", "body")

API_DEFAULTS: dict[Form, dict[str, Any]] = {
    "plain": {},
    "chat": {"temperature": 1.0},
    "completions": {"temperature": 1.0, "max_tokens": 16},
}
"""Defaults of OpenAI's endpoints that differ from the project's own; a job's options beat them, and a row's both."""

Takes = Callable[[Any], bool]


def _only(*values: Any) -> Takes:
    return lambda value: any(value == one and type(value) is type(one) for one in values)


def _anything(value: Any) -> bool:
    return True


NEUTRAL: dict[str, tuple[Takes, str]] = {
    # Of whoever asks, for whoever bills; they say nothing of the answer.
    **dict.fromkeys(
        ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
        (_anything, ""),
    ),
    "store": (_only(False), "answers are kept in the output only"),
    "stream": (_only(False), "a batch writes whole answers; leave it out"),
    "stream_options": (_only(), "a batch writes whole answers; leave it out"),
    "modalities": (_only(["text"]), "the models write text only"),
    "parallel_tool_calls": (_only(True), "what the model calls is not constrained; leave it out"),
    "suffix": (_only(""), "the models continue a text and do not fill gaps; leave it out"),
    **dict.fromkeys(("functions", "function_call"), (_only(), "give tools")),
}
"""Fields that change nothing with some values, and with any other are refused; null stands for their absence."""


def request_of(content: Mapping[str, Any]) -> tuple[Form, dict[str, Any]]:
    """The endpoint of a request, and its body as fields of a row.

    Raises:
        RowError: a form, an endpoint or a field that is not served.
    """
    if unknown := [name for name in content if name not in ENVELOPE]:
        raise RowError(f"unknown field {', '.join(map(repr, unknown))}; a request has: {', '.join(ENVELOPE)}")
    form = ENDPOINTS.get(content["url"]) if isinstance(content.get("url"), str) else None
    if form is None:
        raise RowError(f"url={shown(content.get('url'))} is not served; give {' or '.join(ENDPOINTS)}", "invalid_url")
    if content.get("method") != "POST":
        raise RowError(f'method={shown(content.get("method"))} is not served; give "POST"', "invalid_method")
    if not isinstance(content.get("custom_id"), str):
        raise RowError("custom_id is missing or no text; give each request one of its own", "missing_custom_id")
    body = content.get("body")
    if not isinstance(body, dict):
        raise RowError(f"body is a JSON {json_kind(body)}; give an object with the fields of {content['url']}")
    fields = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in fields if name in NEUTRAL]:
        takes, remedy = NEUTRAL[name]
        if not takes(value := fields.pop(name)):
            raise RowError(f"{name}={shown(value)} is not served: {remedy}", "unsupported_parameter")
    return form, _chat(fields) if form == "chat" else _completion(fields)


def _chat(fields: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in fields:
        raise RowError("prompt is for /v1/completions; give messages")
    if fields.pop("echo", False) is not False:
        raise RowError("echo is for /v1/completions; leave it out", "unsupported_parameter")
    choice = fields.pop("tool_choice", "auto")
    if choice == "none":
        fields.pop("tools", None)
    elif choice != "auto":
        raise RowError(
            f"tool_choice={shown(choice)} is not served: what the model calls is not constrained; give auto or none",
            "unsupported_parameter",
        )
    return _with_seed(fields)


def _completion(fields: dict[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        raise RowError("messages are for /v1/chat/completions; give a prompt")
    best_of = fields.pop("best_of", None)
    if best_of is not None and best_of != fields.get("n", 1):
        raise RowError(f"best_of={shown(best_of)} is not served: give n, and choose among the answers")
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        if len(prompt) > 1:
            raise RowError(f"the request has {len(prompt)} prompts; give each a request of its own")
        fields["prompt"] = prompt[0]
    return _with_seed(fields)


def _with_seed(fields: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's seeds have 64 bits and a sign."""
    seed = fields.get("seed")
    return {**fields, "seed": seed % (MAX_SEED + 1)} if type(seed) is int else fields
