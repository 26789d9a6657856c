"""One base for everything a user configures: frozen, checked on construction, and clear about what is wrong.

Pydantic does the checking; this turns its report into the project's own errors, one clause a field:
`temperature=-1: input should be greater than or equal to 0`. A field whose type carries `refused_as` words its own.
"""

import operator
from collections.abc import Container, Mapping
from typing import Any, ClassVar

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from fineserve_jax.errors import ConfigError, FineServeError

REFUSED = "refused"
MAX_SHOWN = 200  # characters of a value in a message
JSON_KINDS = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}


class Validated(BaseModel):
    """A frozen settings object; unknown fields and bad values raise `error_class`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)
    error_class: ClassVar[type[FineServeError]] = ConfigError

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise self.error_class(describe(error, type(self))) from None


def describe(error: ValidationError, settings: type[BaseModel]) -> str:
    """Pydantic's report as one clause a field: its name, the value given, the limit."""
    clauses = []
    for item in error.errors(include_url=False):
        place = ".".join(str(part) for part in item["loc"])
        if item["type"] == REFUSED:
            clauses.append(item["msg"])
            continue
        if item["type"] == "extra_forbidden":
            known = ", ".join(sorted(field.alias or name for name, field in settings.model_fields.items()))
            clauses.append(f"unknown setting {place!r}; the settings are: {known}")
            continue
        message = item["msg"].removeprefix("Value error, ")
        clauses.append(f"{place}={shown(item['input'])}: {message[:1].lower()}{message[1:]}" if place else message)
    return "; ".join(clauses)


def refused_as(clause: str) -> WrapValidator:
    """What is said of a field, in an `Annotated` type, when pydantic refuses its value.

    Args:
        clause: a format of `field`, `value` (as Python writes it), `kind` (what JSON calls it) and `shown` (a number
            as `value`, anything else as `kind`).
    """

    def validate(value: Any, handler: ValidatorFunctionWrapHandler, info: ValidationInfo) -> Any:
        try:
            return handler(value)
        except ValidationError:
            kind = json_kind(value)
            or_kind = shown(value) if kind == JSON_KINDS[float] else f"a JSON {kind}"
            text = clause.format(field=info.field_name, value=shown(value), kind=kind, shown=or_kind)
            raise refusal(text) from None

    return WrapValidator(validate)


def refusal(text: str) -> PydanticCustomError:
    """What a validator raises to have the whole of what is said in its own words."""
    return PydanticCustomError(REFUSED, "{text}", {"text": text})


def json_kind(value: Any) -> str:
    """What JSON calls a value; of one that JSON does not know, its type."""
    if value is None:
        return "null"
    if isinstance(value, list) and value:
        return "list of whole numbers" if {type(item) for item in value} == {int} else "list of more than whole numbers"
    return JSON_KINDS.get(type(value), type(value).__name__)


def shown(value: Any) -> str:
    """A value as a message names it: cut where it is long, its type where Python cannot write it."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits; lists in lists in lists
        return f"a {type(value).__name__} too large to show"
    return shortened(text)


def shortened(text: str) -> str:
    """A text as a message quotes it."""
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def given_values(values: Mapping[str, Any], fields: Container[str]) -> dict[str, Any]:
    """The fields that are given, those that are not None, and whatever is no field, to be refused. Numpy's numbers and
    arrays become Python's."""
    return {
        name: value.tolist() if isinstance(value, np.generic | np.ndarray) else value
        for name, value in values.items()
        if value is not None or name not in fields
    }


def token_id(value: Any) -> int:
    """A token id as an int: any type of whole number, numpy's included.

    Raises:
        ValueError: a boolean, a number with a fraction, or anything else.
    """
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"a token id is a whole number, not a {type(value).__name__}")
