"""Chat messages to the text a model was trained on, by the Jinja template that comes with its tokenizer."""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fineserve_jax.errors import RequestError
from fineserve_jax.loaders.tokenizer import Tokenizer


def render_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True) -> str:
    """Render messages such as `{"role": "user", "content": "Hi"}` with the tokenizer's chat template.

    add_generation_prompt: end with the opening of the assistant's turn, so that the model answers.

    The result holds its special tokens as text: encode it with `add_special_tokens=False`. The template comes with
    the model and is not trusted: it runs in a sandbox. Raises RequestError for malformed messages, a model without
    a template, and whatever goes wrong in the template itself.
    """
    _check_messages(messages)
    if tokenizer.chat_template is None and tokenizer.other_templates:
        raise RequestError(
            f"this model has several chat templates, none is the default; they are "
            f"{', '.join(tokenizer.other_templates)}; name the one to use 'default' in tokenizer_config.json"
        )
    if tokenizer.chat_template is None:
        raise RequestError(
            "this model has no chat template, so messages cannot be rendered; give a plain prompt, or use an "
            "instruction-tuned model"
        )
    try:
        return _compile(tokenizer.chat_template).render(
            messages=[dict(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens,
        )
    except jinja2.TemplateError as error:
        raise RequestError(f"the model's chat template refuses these messages: {error}") from error
    except Exception as error:  # the template is a program: it may divide by zero, recurse without end, ...
        raise RequestError(f"the model's chat template fails on these messages: {error!r}") from error


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]]) -> tuple[str, list[int]]:
    """Messages as the text that `render_chat` makes of them, and its token ids. Raises RequestError as that does."""
    text = render_chat(tokenizer, messages)
    return text, tokenizer.encode(text, add_special_tokens=False)


def _check_messages(messages: Sequence[Mapping[str, Any]]) -> None:
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
        if not isinstance(message.get("content"), str):
            raise RequestError(
                f"message {index} has content of type {type(message.get('content')).__name__}, expected text"
            )


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment.from_string(source)


def _to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False) -> str:
    """Jinja's own filter escapes for HTML, which would reach the model."""
    return json.dumps(value, indent=indent, ensure_ascii=ensure_ascii)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.datetime.now().strftime(layout)
