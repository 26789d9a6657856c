"""Which of a format's scale arrays say something of keys, and which of values.

Keys and values are encoded side by side but independently of each other; kernels that take one side at a time have to
know what belongs to it. It is read off the format's own code, so that a format need not say it.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats.base import KVFormat

SIDES = KEYS, VALUES = 0, 1


@functools.cache
def sides_of_scales(kv_format: KVFormat) -> tuple[int, ...]:
    """The side, KEYS or VALUES, of each scale array.

    Raises:
        ValueError: one depends on both.
    """
    lanes = (jax.ShapeDtypeStruct((16, 16), jnp.float32),) * kv_format.packed_lanes
    jaxpr = jax.make_jaxpr(lambda k, v: kv_format.encode(k, v).scales)(lanes, lanes).jaxpr
    number = len(lanes)
    known: dict[Any, set[int]] = {variable: {i // number} for i, variable in enumerate(jaxpr.invars)}

    def sides(atom: Any) -> set[int]:
        return set() if hasattr(atom, "val") else known.get(atom, set())

    for eqn in jaxpr.eqns:
        known |= dict.fromkeys(eqn.outvars, set().union(*map(sides, eqn.invars)))
    found = [sides(scales) for scales in jaxpr.outvars]
    for i, both in enumerate(found):
        if len(both) > 1:
            raise ValueError(
                f"scale array {i} of KV format {kv_format.name!r} depends on keys and on values; "
                "make two of it, one for each, so that they can be encoded apart"
            )
    return tuple(max(side, default=KEYS) for side in found)
