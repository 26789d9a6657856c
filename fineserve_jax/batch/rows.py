"""Rows of a file of prompts: read one by one, checked, and turned into what the engine takes."""

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Self

from pydantic import AfterValidator, InstanceOf, StrictInt, model_validator

from fineserve_jax.batch.row_ids import RowId, check_id
from fineserve_jax.errors import FineServeError, RequestError
from fineserve_jax.loaders import ChatOptions, Tokenizer, encode_chat
from fineserve_jax.request_options import RequestOptions
from fineserve_jax.sampling_params import OTHER_NAMES, SamplingParams, own_fields
from fineserve_jax.validation import Validated, json_kind, refused_as, shortened

# InstanceOf: pydantic's own str refuses one with half of a surrogate pair, which is for the tokenizer to refuse.
PromptField = Annotated[
    InstanceOf[str] | list[StrictInt] | None,
    refused_as("{field} is a JSON {kind}; give text, or a list of token ids"),
]
MessagesField = Annotated[
    list[Any] | None, refused_as("{field} is a JSON {kind}; give a list of objects with role and content")
]


class RowName(Validated):
    """By what a row is known.

    Attributes:
        line: where it stands, from 1 on.
        id: its own, or the line.
    """

    error_class: ClassVar[type[FineServeError]] = RequestError

    line: int
    id: Annotated[RowId, AfterValidator(check_id)]


class BatchRow(RowName):
    """A row as it was written, checked as far as it can be without the job's defaults and the model's tokenizer.

    Attributes:
        prompt: text or token ids; None if there are messages.
        messages: a conversation; None if there is a prompt.
        chat: how its messages are rendered.
        options: what it asks of the engine.
        sampling: the sampling fields it sets, unchecked; see `row_sampling`.
    """

    prompt: PromptField = None
    messages: MessagesField = None
    chat: InstanceOf[ChatOptions] = ChatOptions()
    options: InstanceOf[RequestOptions]
    sampling: dict[str, Any]

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            have = "neither prompt nor messages" if self.prompt is None else "both prompt and messages"
            raise ValueError(f"the row has {have}; give one of them")
        if self.messages is None and self.chat.model_fields_set:
            raise ValueError(f"{min(self.chat.model_fields_set)} is for messages, the row has a prompt; leave it out")
        return self


ROW_FIELDS = (
    *("id", "prompt", "messages"),
    *ChatOptions.model_fields,
    *RequestOptions.model_fields,
    *SamplingParams.model_fields,
    *OTHER_NAMES,
)


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be answered, and why. `id` is the line where the row has no usable one."""

    line: int
    id: RowId
    error: str


def read_rows(lines: Iterable[bytes]) -> Iterator[BatchRow | BadRow]:
    """The rows of JSON lines; empty lines are passed over but count."""
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.strip():
            yield parse_row(line, number)


def parse_row(line: bytes, number: int) -> BatchRow | BadRow:
    """One line as a row; never raises for what the line holds."""
    try:
        content = json.loads(line.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        return BadRow(number, number, f"line {number} is not UTF-8: {error.reason} at byte {error.start}")
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        return BadRow(number, number, f"line {number} is not JSON: {error}")
    if not isinstance(content, dict):
        return BadRow(number, number, f"line {number} holds a JSON {json_kind(content)}, not an object with a prompt")
    row_id: RowId = number
    try:
        row_id = RowName(line=number, id=number if content.get("id") is None else content["id"]).id
        return _row(number, row_id, content)
    except RequestError as error:
        return BadRow(number, row_id, str(error))
    except Exception as error:
        return BadRow(number, row_id, unforeseen(error))


def unforeseen(error: BaseException) -> str:
    """What is said of a row that fails for no reason that was foreseen; the other rows are not to suffer from it."""
    return (
        f"the row cannot be prepared: {type(error).__name__}: {shortened(str(error))}; "
        "this is a fault of fineserve-jax, please report it with the row"
    )


def prompt_tokens(row: BatchRow, tokenizer: Tokenizer, max_tokens: int | None = None) -> list[int]:
    """The row's prompt as token ids. Raises `RequestError`. `max_tokens`: see `Tokenizer.encode`."""
    if row.messages is not None:
        _, token_ids = encode_chat(tokenizer, row.messages, row.chat, max_tokens=max_tokens)
        return token_ids
    if isinstance(row.prompt, str):
        return tokenizer.encode_prompt(row.prompt, max_tokens)
    return list(row.prompt or ())


def row_sampling(row: BatchRow, defaults: Mapping[str, Any]) -> SamplingParams:
    """How to sample the row: its own fields over `defaults`, null for a field's own default. Raises `RequestError`."""
    return SamplingParams(**{**own_fields(defaults), **own_fields(row.sampling)})


def _row(number: int, row_id: RowId, content: Mapping[str, Any]) -> BatchRow:
    """The row that an object makes, its fields sorted by whose they are. Raises `RequestError`."""
    if unknown := [name for name in content if name not in ROW_FIELDS]:
        raise RequestError(f"unknown field {', '.join(map(repr, unknown))}; a row may have: {', '.join(ROW_FIELDS)}")
    return BatchRow(
        line=number,
        id=row_id,
        prompt=content.get("prompt"),
        messages=content.get("messages"),
        chat=ChatOptions(**_fields(content, ChatOptions.model_fields)),
        options=RequestOptions(**_fields(content, RequestOptions.model_fields)),
        sampling=_fields(content, (*SamplingParams.model_fields, *OTHER_NAMES)),
    )


def _fields(content: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if name in names}


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")
