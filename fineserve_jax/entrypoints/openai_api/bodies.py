"""Bodies of requests to OpenAI's endpoints: each field is honoured or refused.

Besides those of the endpoint a body may have any field of a row of `fineserve-jax batch`, such as `kv_precision`.
"""

from collections.abc import Mapping
from typing import Any

from fineserve_jax.entrypoints.openai_api.fields import FieldError, Form
from fineserve_jax.request.sampling_params import MAX_SEED
from fineserve_jax.validation import shown

ENDPOINTS: dict[str, Form] = {"/v1/chat/completions": "chat", "/v1/completions": "completions"}

API_DEFAULTS: dict[Form, dict[str, Any]] = {
    "plain": {},
    "chat": {"temperature": 1.0},
    "completions": {"temperature": 1.0, "max_tokens": 16},
}
"""Defaults of OpenAI's endpoints that differ from the project's own; options of the command line beat them, and a
request's own fields both."""

Neutral = Mapping[str, tuple[tuple[Any, ...] | None, str]]

NEUTRAL: Neutral = {
    # Of whoever asks, for whoever bills; they say nothing of the answer.
    **dict.fromkeys(
        ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier"),
        (None, ""),
    ),
    "store": ((False,), "answers are sent, and not kept"),
    "modalities": ((["text"],), "the models write text only"),
    "suffix": (("",), "the models continue a text and do not fill gaps; leave it out"),
    **dict.fromkeys(("functions", "function_call"), ((), "give tools")),
}
"""Fields that change nothing with these values, or with any (None), and with any other are refused; null stands for
their absence. And what to do instead."""


def body_fields(form: Form, body: Mapping[str, Any], neutral: Neutral = NEUTRAL) -> dict[str, Any]:
    """A body as fields of a row. A list of prompts stays one if there are several.

    Args:
        form: of its endpoint.
        neutral: fields that may be there and change nothing.

    Raises:
        FieldError: a field that is not served so.
    """
    fields = {name: value for name, value in body.items() if value is not None}
    for name in [name for name in fields if name in neutral]:
        taken, remedy = neutral[name]
        if not _is_one_of(value := fields.pop(name), taken):
            raise FieldError(f"{name}={shown(value)} is not served: {remedy}", "unsupported_parameter")
    return _chat(fields) if form == "chat" else _completion(fields)


def _is_one_of(value: Any, taken: tuple[Any, ...] | None) -> bool:
    return taken is None or any(value == one and type(value) is type(one) for one in taken)


def prompts_of(fields: Mapping[str, Any]) -> list[Any] | None:
    """The prompts of a completion that has a list of them; None: it has one prompt, or none."""
    prompt = fields.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(one, str | list) for one in prompt):
        return prompt
    return None


def _chat(fields: dict[str, Any]) -> dict[str, Any]:
    if "prompt" in fields:
        raise FieldError("prompt is for /v1/completions; give messages")
    if fields.pop("echo", False) is not False:
        raise FieldError("echo is for /v1/completions; leave it out", "unsupported_parameter")
    return _with_seed(fields)


def _completion(fields: dict[str, Any]) -> dict[str, Any]:
    if "messages" in fields:
        raise FieldError("messages are for /v1/chat/completions; give a prompt")
    best_of = fields.pop("best_of", None)
    if best_of is not None and best_of != fields.get("n", 1):
        raise FieldError(f"best_of={shown(best_of)} is not served: give n, and choose among the answers")
    prompts = prompts_of(fields)
    if prompts is not None and len(prompts) == 1:
        fields["prompt"] = prompts[0]
    return _with_seed(fields)


def _with_seed(fields: dict[str, Any]) -> dict[str, Any]:
    """OpenAI's seeds have 64 bits and a sign."""
    seed = fields.get("seed")
    return {**fields, "seed": seed % (MAX_SEED + 1)} if type(seed) is int else fields
