"""The schemas inside of a JSON schema, and their places."""

from collections.abc import Iterator
from typing import Any

MAPS = ("$defs", "definitions", "properties", "patternProperties", "dependentSchemas")
LISTS = ("prefixItems", "items", "allOf", "anyOf", "oneOf")
SINGLE = ("items", "additionalItems", "additionalProperties")
SHARED = ("$defs", "definitions")
"""What other parts refer to, first of all."""


def schema_parts(schema: Any, pointer: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each schema in `schema` that is an object, itself included, with its JSON pointer (RFC 6901): those that others
    refer to first, then inner ones before outer ones."""
    if not isinstance(schema, dict):
        return
    for name, value in sorted(schema.items(), key=lambda item: item[0] not in SHARED):
        here = f"{pointer}/{escaped(name)}"
        if name in MAPS and isinstance(value, dict):
            for key, part in value.items():
                yield from schema_parts(part, f"{here}/{escaped(key)}")
        elif name in LISTS and isinstance(value, list):
            for index, part in enumerate(value):
                yield from schema_parts(part, f"{here}/{index}")
        elif name in SINGLE:
            yield from schema_parts(value, here)
    yield pointer, schema


def escaped(token: str) -> str:
    """A key as it stands in a JSON pointer."""
    return token.replace("~", "~0").replace("/", "~1")
