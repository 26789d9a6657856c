"""Rows of a job's inputs: checked as far as they can be by themselves, each by itself."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fineserve_jax.entrypoints.batch.openai_rows import request_of
from fineserve_jax.entrypoints.batch.records import SEQ_BITS, Record, place
from fineserve_jax.entrypoints.batch.row_ids import RowId, check_id
from fineserve_jax.entrypoints.openai_api.asked import Asked, sort_fields
from fineserve_jax.entrypoints.openai_api.fields import FieldError, Form
from fineserve_jax.entrypoints.openai_api.json_objects import decode_object
from fineserve_jax.errors import RequestError
from fineserve_jax.validation import shortened, shown


@dataclass(frozen=True, slots=True)
class BatchRow(Asked):
    """A row as it was written, checked as far as it can be without the job's defaults and the model's tokenizer.

    Attributes:
        line: where it stands in its file, from 1 on.
        id: its own, or made of the line.
        file: which of the inputs it is from.
    """

    line: int
    id: RowId
    file: int = 0

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
            raise FieldError(content, "invalid_line")
        return content
    return decode_object(content, f"line {line}", "invalid_line")


def _form(content: Mapping[str, Any]) -> Form:
    return "chat" if "custom_id" in content or "body" in content else "plain"


def _row(content: Mapping[str, Any], line: int, row_id: RowId, form: Form, file: int) -> BatchRow:
    """The row that an object makes. Raises `RequestError`."""
    return BatchRow(line, row_id, file, form=form, **sort_fields(content, form, "row"))


def _checked(name: str, check: Callable[[Any], Any], value: Any) -> Any:
    try:
        return check(value)
    except ValueError as error:
        raise RequestError(f"{name}={shown(value)}: {error}") from None
