"""One base for everything a user configures: frozen, checked on construction, and clear about what is wrong.

Pydantic does the checking; this turns its report into the project's own errors, one line a field:
`temperature=-1: input should be greater than or equal to 0`.
"""

from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError

from fineserve_jax.errors import ConfigError, FineServeError


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
        field = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            known = ", ".join(sorted(settings.model_fields))
            clauses.append(f"unknown setting {field!r}; the settings are: {known}")
            continue
        message = item["msg"].removeprefix("Value error, ")
        clauses.append(f"{field}={item['input']!r}: {message[:1].lower()}{message[1:]}" if field else message)
    return "; ".join(clauses)
