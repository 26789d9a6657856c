"""Ids of rows: any JSON value, written back as it was read."""

import hashlib
import json
import math
from typing import Any

MAX_DEPTH = 64
MAX_PLAIN = 64  # characters of an id that is its own key
JSON_TYPES = (str, bool, int, float, list, dict)

RowId = Any
"""What `json.loads` makes of a JSON value other than null."""

IdKey = int | float | str | bytes
"""What tells ids apart, in memory and in a database."""


def check_id(row_id: RowId, depth: int = 0) -> RowId:
    """The id. Raises ValueError for one that cannot be written back, or that nests lists and objects too deeply."""
    if isinstance(row_id, float) and not math.isfinite(row_id):
        raise ValueError("a number of the id is greater than a double can hold; give it as text")
    if row_id is not None and not isinstance(row_id, JSON_TYPES):
        raise ValueError(f"an id of type {type(row_id).__name__} is no JSON value; give it as text")
    if isinstance(row_id, list | dict):
        if depth == MAX_DEPTH:
            raise ValueError(f"the id has lists or objects in more than {MAX_DEPTH} levels; give a flatter one")
        for part in row_id.values() if isinstance(row_id, dict) else row_id:
            check_id(part, depth + 1)
    return row_id


def id_key(row_id: RowId) -> IdKey:
    """Equal for equal ids, by the rules of JSON Schema.

    Numbers are equal by value, 1 and 1.0 too; objects are, whatever the order of their members; nothing equals a value
    of another type, so that neither true nor "1" is 1. What is neither a short text nor a number that SQLite can hold
    is known by 128 bits of a digest.
    """
    if isinstance(row_id, float) and row_id.is_integer():
        row_id = int(row_id)
    if isinstance(row_id, int) and not isinstance(row_id, bool) and -(2**63) <= row_id < 2**63:
        return row_id
    if isinstance(row_id, float) or (isinstance(row_id, str) and len(row_id) <= MAX_PLAIN and row_id.isascii()):
        return row_id
    canonical = json.dumps(_canonical(row_id), sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=16).digest()


def _canonical(value: Any) -> Any:
    """The value with numbers of equal value written alike."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [_canonical(part) for part in value]
    if isinstance(value, dict):
        return {name: _canonical(part) for name, part in value.items()}
    return value
