"""JSON as it is read and written: UTF-8, no NaN, nothing too deep, and an error that says what is wrong."""

import json
from typing import Any

from pydantic_core import PydanticSerializationError, to_json

from fineserve_jax.entrypoints.openai_api.fields import FieldError
from fineserve_jax.validation import json_kind


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON value")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def decode_object(data: bytes, what: str, code: str) -> dict[str, Any]:
    """The object that the bytes are.

    Args:
        what: what they are called in errors.
        code: of errors.

    Raises:
        FieldError: bytes that are not UTF-8 or no JSON, or JSON that is no object.
    """
    try:
        fields = _DECODER.decode(data.decode())
    except UnicodeDecodeError as error:
        raise FieldError(f"{what} is not UTF-8: {error.reason} at byte {error.start}", code) from None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        raise FieldError(f"{what} is not JSON: {error}", code) from None
    if not isinstance(fields, dict):
        raise FieldError(f"{what} holds a JSON {json_kind(fields)}, not an object with a prompt", code)
    return fields


def encode_json(content: Any) -> bytes:
    """As JSON. It must hold neither NaN nor infinity, which JSON lacks: raises `ValueError`."""
    try:
        encoded = to_json(content)
    except PydanticSerializationError:  # half a surrogate pair
        return json.dumps(content, allow_nan=False).encode()
    if b"NaN" in encoded or b"Infinity" in encoded:  # as text, or as what raises here
        return json.dumps(content, allow_nan=False).encode()
    return encoded
