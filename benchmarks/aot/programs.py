"""What a traced program contains: its Pallas kernels, and which of their operands is the arena."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


def arena_operands(jaxpr: Any, arena_size: int) -> dict[str, set[int]]:
    """The Pallas kernels in a jaxpr, by name, each with the indices of the operands, and behind them results, that are
    the arena."""
    found: dict[str, set[int]] = {}
    for eqn in kernels_in(jaxpr):
        arenas = found.setdefault(eqn.params["name"] or "kernel", set())
        for i, variable in enumerate((*eqn.invars, *eqn.outvars)):
            if variable.aval.dtype == np.uint16 and variable.aval.size == arena_size:
                arenas.add(i)
    return found


def kernels_in(jaxpr: Any) -> Iterator[Any]:
    """The `pallas_call` equations of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "pallas_call":
            yield eqn
        else:
            for inner in jax.core.jaxprs_in_params(eqn.params):
                yield from kernels_in(inner)
