"""Requests of OpenAI's batch API as rows: {"custom_id", "method", "url", "body"}.

Form and meaning as in OpenAI's reference of the batch API; of bodies, see `openai_api.bodies`.
"""

from collections.abc import Mapping
from typing import Any

from fineserve_jax.entrypoints.openai_api.bodies import ENDPOINTS, NEUTRAL, Neutral, body_fields, prompts_of
from fineserve_jax.entrypoints.openai_api.fields import FieldError, Form
from fineserve_jax.validation import json_kind, shown

ENVELOPE = ("custom_id", "method", "url", "body")
NOT_STREAMED: Neutral = {
    **NEUTRAL,
    "stream": ((False,), "a batch writes whole answers; leave it out"),
    "stream_options": ((), "a batch writes whole answers; leave it out"),
}


def request_of(content: Mapping[str, Any]) -> tuple[Form, dict[str, Any]]:
    """The endpoint of a request, and its body as fields of a row.

    Raises:
        FieldError: a form, an endpoint or a field that is not served.
    """
    if unknown := [name for name in content if name not in ENVELOPE]:
        raise FieldError(f"unknown field {', '.join(map(repr, unknown))}; a request has: {', '.join(ENVELOPE)}")
    form = ENDPOINTS.get(content["url"]) if isinstance(content.get("url"), str) else None
    if form is None:
        raise FieldError(f"url={shown(content.get('url'))} is not served; give {' or '.join(ENDPOINTS)}", "invalid_url")
    if content.get("method") != "POST":
        raise FieldError(f'method={shown(content.get("method"))} is not served; give "POST"', "invalid_method")
    if not isinstance(content.get("custom_id"), str):
        raise FieldError("custom_id is missing or no text; give each request one of its own", "missing_custom_id")
    body = content.get("body")
    if not isinstance(body, dict):
        raise FieldError(f"body is a JSON {json_kind(body)}; give an object with the fields of {content['url']}")
    fields = body_fields(form, body, NOT_STREAMED)
    prompts = prompts_of(fields)
    if prompts is not None and len(prompts) > 1:
        raise FieldError(f"the request has {len(prompts)} prompts; give each a request of its own")
    return form, fields
