"""Where in a JSON schema that is not supported the fault lies: whoever compiles it says only what it is."""

import re
from collections.abc import Callable
from itertools import islice
from typing import Any

from fineserve_jax.request.structured.schema_parts import SHARED, escaped, schema_parts

MOST_PARTS = 300
"""Parts of a schema that are looked at one by one. Of a larger one the fault may be told without its place."""
REWORDED = (
    (re.compile(r"Unimplemented keys: \[(.*)\]"), r"\1 is not supported"),
    (re.compile(r"oneOf constraints are not supported\..*"), "its alternatives do not exclude each other; use anyOf"),
)


def find_fault(schema: dict[str, Any], error: str, error_of: Callable[[Any], str | None]) -> tuple[str, str]:
    """The place of what keeps a schema from being compiled, and what it is.

    Args:
        error: what is said of the schema.
        error_of: what is said of any; None: that it can be compiled.

    Returns:
        the smallest part with this error, as a fragment "#/..." that is a JSON pointer, and the error.
    """
    shared = {name: schema[name] for name in SHARED if name in schema}
    place = ""
    for pointer, part in islice(schema_parts(schema), MOST_PARTS):
        alone = {**shared, **part}
        if error_of(alone) == error:
            keys = sorted(part, key="type".__eq__)  # without its type a part is mostly right, whatever is wrong with it
            guilty = next((key for key in keys if error_of(_without(alone, key)) != error), None)
            place = pointer if guilty is None else f"{pointer}/{escaped(guilty)}"
            break
    for pattern, wording in REWORDED:
        error = pattern.sub(wording, error)
    return f"#{place}", error


def _without(schema: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in schema.items() if name != key}
