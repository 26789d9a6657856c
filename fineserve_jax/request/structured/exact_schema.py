"""What llguidance takes of a JSON schema but would not keep to: made exact where that can be, else refused.

Found by comparing what it allows with a validator: a whole exclusive bound of a number is allowed where the other
bound is less than 1 away; and a name may come twice among `additionalProperties`, which `minProperties` counts once.
"""

from typing import Any

from fineserve_jax.request.structured.schema_parts import schema_parts

NUDGE = 1e-9
LARGEST_NUDGED = 2.0**20
"""Up to here NUDGE is more than rounding takes away."""


def make_exact(schema: dict[str, Any]) -> str | None:
    """Changes a schema in place, so that all that is allowed is valid; returns the place and name of what cannot be."""
    for pointer, part in schema_parts(schema):
        _nudge(part, "minimum", "exclusiveMinimum", NUDGE)
        _nudge(part, "maximum", "exclusiveMaximum", -NUDGE)
        least, required = part.get("minProperties"), part.get("required")
        certain = len(required) if isinstance(required, list) else 0
        if isinstance(least, int | float) and least > certain + 1:
            return (
                f"#{pointer}/minProperties: {least:g} properties of which {certain} are required, while one more "
                "can be told from these; name them as required"
            )
    return None


def _nudge(part: dict[str, Any], bound: str, exclusive: str, by: float) -> None:
    """Numbers nearer than NUDGE to a whole exclusive bound are excluded with it."""
    limit: Any = part.get(exclusive)
    if limit is True:  # draft 4
        limit = part.get(bound)
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if is_number and abs(limit) <= LARGEST_NUDGED and limit == int(limit):
        part[exclusive] = limit + by
