"""Rows of a job's inputs: checked as far as they can be by themselves, each by itself."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from fineserve_jax.batch.openai_rows import request_of
from fineserve_jax.batch.records import SEQ_BITS, Record, place
from fineserve_jax.batch.row_fields import CHAT_FIELDS, OPTION_FIELDS, ROW_FIELDS, SAMPLING_FIELDS, Form, RowError
from fineserve_jax.batch.row_ids import RowId, check_id
from fineserve_jax.errors import RequestError
from fineserve_jax.loaders import ChatOptions
from fineserve_jax.request_options import RequestOptions
from fineserve_jax.validation import Validated, json_kind, shortened, shown

PLAIN_CHAT, PLAIN_OPTIONS = ChatOptions(), RequestOptions()
REMEMBERED, REMEMBERED_LENGTH = 4096, 4096
"""Most different settings that are remembered as checked, and most characters of each."""


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A row as it was written, checked as far as it can be without the job's defaults and the model's tokenizer.

    Attributes:
        line: where it stands in its file, from 1 on.
        id: its own, or made of the line.
        prompt: text or token ids; None if there are messages.
        messages: a conversation; None if there is a prompt.
        chat: how its messages are rendered.
        options: what it asks of the engine.
        sampling: the sampling fields it sets, unchecked.
        form: as what it came.
        file: which of the inputs it is from.
        echo: whether its answer begins with its prompt.
    """

    line: int
    id: RowId
    prompt: str | list[int] | None = None
    messages: list[Any] | None = None
    chat: ChatOptions = PLAIN_CHAT
    options: RequestOptions = PLAIN_OPTIONS
    sampling: Mapping[str, Any] = field(default_factory=dict)
    form: Form = "plain"
    file: int = 0
    echo: bool = False

    @property
    def seq(self) -> int:
        """Its place among all rows."""
        return (self.file << SEQ_BITS) | self.line  # as `place`, which takes as long again to call


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be answered.

    Attributes:
        line, file, form: as of `BatchRow`.
        id: made of the line where the row has no usable one.
        error: why, for people.
        code: why, for programs: invalid_line, invalid_request, duplicate_id, not_finite, dead_end,
            engine_fault, late or internal_error; and those of `openai_rows`.
    """

    line: int
    id: RowId
    error: str
    code: str = "invalid_request"
    form: Form = "plain"
    file: int = 0

    @property
    def seq(self) -> int:
        return place(self.file, self.line)


def read_rows(
    records: Iterable[Record], names: Sequence[str] = (), openai: bool = False
) -> Iterator[BatchRow | BadRow]:
    """The rows of records; see `parse_row`."""
    return (parse_row(record, names, openai) for record in records)


def parse_row(record: Record, names: Sequence[str] = (), openai: bool = False) -> BatchRow | BadRow:
    """One record as a row; never raises for what it holds.

    Args:
        names: of the inputs, by their numbers; with more than one they are part of ids that are made of lines.
        openai: whether what cannot be read at all is answered as OpenAI's batch API does.
    """
    line, file = record.line, record.file
    row_id: RowId = line if len(names) < 2 else f"{names[file]}:{line}"
    form: Form = "chat" if openai else "plain"
    try:
        content = _fields_of(record)
        form = _form(content)
        own_id = content.get("id" if form == "plain" else "custom_id")
        if own_id is not None:
            row_id = _checked("id", check_id, own_id)
        if form == "plain":
            return _row(content, line, row_id, "plain", file)
        form, fields = request_of(content)
        return _row(fields, line, row_id, form, file)
    except RequestError as error:
        return BadRow(line, row_id, str(error), getattr(error, "code", "invalid_request"), form, file)
    except Exception as error:
        return BadRow(line, row_id, unforeseen(error), "internal_error", form, file)


def unforeseen(error: BaseException) -> str:
    """What is said of a row that fails for no reason that was foreseen; the other rows are not to suffer from it."""
    return (
        f"the row cannot be prepared: {type(error).__name__}: {shortened(str(error))}; "
        "this is a fault of fineserve-jax, please report it with the row"
    )


def _fields_of(record: Record) -> Mapping[str, Any]:
    content, line = record.content, record.line
    if not isinstance(content, bytes):
        if isinstance(content, str):
            raise RowError(content, "invalid_line")
        return content
    try:
        fields = _DECODER.decode(content.decode())
    except UnicodeDecodeError as error:
        raise RowError(f"line {line} is not UTF-8: {error.reason} at byte {error.start}", "invalid_line") from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise RowError(f"line {line} is not JSON: {error}", "invalid_line") from None
    if not isinstance(fields, dict):
        raise RowError(f"line {line} holds a JSON {json_kind(fields)}, not an object with a prompt", "invalid_line")
    return fields


def _form(content: Mapping[str, Any]) -> Form:
    return "chat" if "custom_id" in content or "body" in content else "plain"


def _row(content: Mapping[str, Any], line: int, row_id: RowId, form: Form, file: int) -> BatchRow:
    """The row that an object makes, its fields sorted by whose they are. Raises `RequestError`."""
    prompt = messages = echo = None
    chat, options, sampling = {}, {}, {}
    unknown = []
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
        elif name != "id" or form != "plain":
            unknown.append(name)
    if unknown:
        raise RequestError(f"unknown field {', '.join(map(repr, unknown))}; a row may have: {', '.join(ROW_FIELDS)}")
    if (prompt is None) == (messages is None):
        have = "neither prompt nor messages" if prompt is None else "both prompt and messages"
        raise RequestError(f"the row has {have}; give one of them")
    chat_options = REMEMBERED_CHAT(chat)
    if messages is None and chat and chat_options.model_fields_set:
        raise RequestError(f"{min(chat_options.model_fields_set)} is for messages, the row has a prompt; leave it out")
    if messages is not None and echo:
        raise RequestError("echo=True is for a prompt, the row has messages; leave it out")
    own = REMEMBERED_OPTIONS(options)
    return BatchRow(line, row_id, prompt, messages, chat_options, own, sampling, form, file, bool(echo))


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


def _checked(name: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise RequestError(f"{name}={shown(value)}: {error}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


Settings = TypeVar("Settings", bound=Validated)


class Remembered:
    """Makes settings of fields, and remembers those it made: most rows of a file ask for the same.

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
