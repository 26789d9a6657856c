"""OpenAI's `response_format` as this project's structured outputs."""

from collections.abc import Mapping
from typing import Any

from fineserve_jax.errors import RequestError
from fineserve_jax.validation import shown

TYPES = "text, json_object or json_schema"
SCHEMA_KEYS = ("name", "description", "schema", "strict")


def structured_outputs_of(response_format: Any) -> dict[str, Any] | None:
    """Fields of `StructuredOutputsParams`; None where any text will do.

    A schema is kept to whether it is `strict` or not, and it is the whole of what must be: unlike OpenAI's API, strict
    does not demand that all properties are required.

    Raises:
        RequestError: anything but one of OpenAI's forms.
    """
    if response_format is None:
        return None
    if not isinstance(response_format, Mapping):
        raise RequestError(
            f'response_format={shown(response_format)} is no object; give one such as {{"type": "text"}}'
        )
    match response_format.get("type"), set(response_format) - {"type"}:
        case "text", rest if not rest:
            return None
        case "json_object", rest if not rest:
            return {"json_object": True}
        case "json_schema", rest if rest == {"json_schema"}:
            return {"json": _schema(response_format["json_schema"])}
    raise RequestError(
        f"response_format={shown(dict(response_format))} is none of the known ones: its type is {TYPES}, and with the "
        'last goes one other member: {"type": "json_schema", "json_schema": {"name": "x", "schema": {...}}}'
    )


def _schema(table: Any) -> Any:
    if not isinstance(table, Mapping) or "schema" not in table:
        raise RequestError(f"response_format.json_schema={shown(table)} has no schema; give name and schema")
    if unknown := [key for key in table if key not in SCHEMA_KEYS]:
        raise RequestError(
            f"response_format.json_schema has {shown(unknown[0])}; it may have: {', '.join(SCHEMA_KEYS)}"
        )
    return table["schema"]
