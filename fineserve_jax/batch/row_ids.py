"""Ids of rows: any JSON value, written back as it was read."""

import math
from collections.abc import Hashable
from typing import Any

MAX_DEPTH = 64

RowId = Any
"""What `json.loads` makes of a JSON value other than null."""


def check_id(row_id: RowId, depth: int = 0) -> RowId:
    """The id. Raises ValueError for one that cannot be written back, or that nests lists and objects too deeply."""
    if isinstance(row_id, float) and not math.isfinite(row_id):
        raise ValueError("a number of the id is greater than a double can hold; give it as text")
    if isinstance(row_id, list | dict):
        if depth == MAX_DEPTH:
            raise ValueError(f"the id has lists or objects in more than {MAX_DEPTH} levels; give a flatter one")
        for part in row_id.values() if isinstance(row_id, dict) else row_id:
            check_id(part, depth + 1)
    return row_id


def id_key(row_id: RowId) -> Hashable:
    """Equal for equal ids, by the rules of JSON Schema.

    Numbers are equal by value, 1 and 1.0 too; objects are, whatever the order of their members; nothing equals a value
    of another type, so that neither true nor "1" is 1.
    """
    if isinstance(row_id, bool):
        return bool, row_id
    if isinstance(row_id, float) and row_id.is_integer():
        return int(row_id)
    if isinstance(row_id, list):
        return list, tuple(map(id_key, row_id))
    if isinstance(row_id, dict):
        return dict, frozenset((name, id_key(value)) for name, value in row_id.items())
    return row_id
