"""What is asked: fields of a row or of a body, sorted by whose they are, and what the engine takes of them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from fineserve_jax.entrypoints.openai_api.bodies import API_DEFAULTS
from fineserve_jax.entrypoints.openai_api.fields import CHAT_FIELDS, FIELDS, OPTION_FIELDS, SAMPLING_FIELDS, Form
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions, Tokenizer, encode_chat
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams, own_fields
from fineserve_jax.validation import json_kind, shown

PLAIN_CHAT, PLAIN_OPTIONS = ChatOptions(), RequestOptions()
REMEMBERED, REMEMBERED_LENGTH = 4096, 4096
"""Most different settings that are remembered as checked, and most characters of each."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """A request, checked as far as it can be without defaults and the model's tokenizer.

    Attributes:
        prompt: text or token ids; None if there are messages.
        messages: a conversation; None if there is a prompt.
        chat: how its messages are rendered.
        options: what it asks of the engine.
        sampling: the sampling fields it sets, unchecked.
        form: as what it came.
        echo: whether its answer begins with its prompt.
    """

    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    chat: ChatOptions = PLAIN_CHAT
    options: RequestOptions = PLAIN_OPTIONS
    sampling: Mapping[str, Any] = field(default_factory=dict)
    form: Form = "plain"
    echo: bool = False


def sort_fields(content: Mapping[str, Any], form: Form, what: str = "request") -> dict[str, Any]:
    """Fields of `Asked`, but for the form, of an object's; null stands for a field's absence.

    Args:
        what: what the object is called in errors.

    Raises:
        RequestError: an unknown field, a bad one, or neither or both of prompt and messages.
    """
    prompt = messages = echo = None
    chat, options, sampling = {}, {}, {}
    unknown = []
    own = ("id",) if form == "plain" else ()
    for name, value in content.items():
        if name in SAMPLING_FIELDS:
            sampling[name] = value
        elif name == "prompt":
            prompt = _checked_prompt(value)
        elif name == "messages":
            messages = _checked_messages(value)
        elif name == "echo":
            echo = _checked_echo(value)
        elif name in OPTION_FIELDS:
            options[name] = value
        elif name in CHAT_FIELDS:
            chat[name] = value
        elif name not in own:
            unknown.append(name)
    if unknown:
        known = ", ".join((*own, *FIELDS))
        raise RequestError(f"unknown field {', '.join(map(repr, unknown))}; a {what} may have: {known}")
    if (prompt is None) == (messages is None):
        have = "neither prompt nor messages" if prompt is None else "both prompt and messages"
        raise RequestError(f"the {what} has {have}; give one of them")
    chat_options = REMEMBERED_CHAT(chat)
    if messages is None and chat and chat_options.model_fields_set:
        first = min(chat_options.model_fields_set)
        raise RequestError(f"{first} is for messages, the {what} has a prompt; leave it out")
    if messages is not None and echo:
        raise RequestError(f"echo=True is for a prompt, the {what} has messages; leave it out")
    return {
        "prompt": prompt,
        "messages": messages,
        "chat": chat_options,
        "options": REMEMBERED_OPTIONS(options),
        "sampling": sampling,
        "echo": bool(echo),
    }


def _checked_prompt(value: Any) -> str | list[int] | None:
    if value is None or isinstance(value, str) or (isinstance(value, list) and all(type(i) is int for i in value)):
        return value
    raise RequestError(f"prompt is a JSON {json_kind(value)}; give text, or a list of token ids")


def _checked_echo(value: Any) -> bool | None:
    if value is None or isinstance(value, bool):
        return value
    raise RequestError(f"echo={shown(value)} is neither true nor false; give one of them, or none")


def _checked_messages(value: Any) -> list[Any] | None:
    if value is None or isinstance(value, list):
        return value
    raise RequestError(f"messages is a JSON {json_kind(value)}; give a list of objects with role and content")


class Remembered:
    """Makes settings of fields, and remembers those it made: most requests ask for the same.

    Args:
        make: of fields, raises `RequestError`.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make, self._made = make, dict[str, Any]()
        self._default = make()

    def __call__(self, fields: Mapping[str, Any]) -> Any:
        if not fields:
            return self._default
        try:
            key = repr(fields)
        except RecursionError:
            raise RequestError(f"{', '.join(fields)}: nested too deeply; give flatter values") from None
        made = self._made.get(key)
        if made is None:
            made = self._make(**fields)
            if len(self._made) >= REMEMBERED:
                self._made.clear()
            if len(key) <= REMEMBERED_LENGTH:
                self._made[key] = made
        return made


REMEMBERED_CHAT, REMEMBERED_OPTIONS = Remembered(ChatOptions), Remembered(RequestOptions)


class SamplingDefaults:
    """Makes `SamplingParams` of what is asked.

    Args:
        defaults: fields of `SamplingParams` for requests that do not set them; they beat those of OpenAI's endpoints.
    """

    def __init__(self, defaults: Mapping[str, Any] | None = None) -> None:
        own = own_fields(defaults or {})
        self._defaults = {form: {**fields, **own} for form, fields in API_DEFAULTS.items()}
        self._sampling = Remembered(SamplingParams)

    def sampling(self, asked: Asked) -> SamplingParams:
        """How to sample: its own fields over the defaults, null for a field's own default.

        With `echo`, `logprobs` are wanted of the prompt, too.

        Raises:
            RequestError: values that cannot be honoured.
        """
        fields = {**self._defaults[asked.form], **own_fields(asked.sampling)}
        seed = fields.pop("seed", None)
        if asked.echo and fields.get("prompt_logprobs") is None:
            fields["prompt_logprobs"] = fields.get("logprobs")
        sampling: SamplingParams = asked.chat.constrained(self._sampling(fields))
        return sampling if seed is None else sampling.model_copy(update={"seed": SamplingParams(seed=seed).seed})


def prompt_tokens(asked: Asked, tokenizer: Tokenizer, max_tokens: int | None = None) -> list[int]:
    """The prompt as token ids. Raises `RequestError`. `max_tokens`: see `Tokenizer.encode`."""
    if asked.messages is not None:
        _, token_ids = encode_chat(tokenizer, asked.messages, asked.chat, max_tokens=max_tokens)
        return token_ids
    if isinstance(asked.prompt, str):
        return tokenizer.encode_prompt(asked.prompt, max_tokens)
    return list(asked.prompt or ())
