"""Compiling programs side by side, ahead of their first calls.

What calls the programs of a step is run with stand-ins for them: a stand-in traces its program, has a pool compile it,
and returns the shapes of what it would give. XLA compiles without the interpreter's lock. When the programs
are called afterwards, JAX finds them compiled.
"""

import os
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any

import jax

Program = Callable[..., Any]
MAX_THREADS = 8
"""XLA takes memory for each program that it compiles."""


def num_threads() -> int:
    """How many programs are compiled at a time."""
    return min(os.cpu_count() or 1, MAX_THREADS)


class CompileAhead:
    """Gives programs stand-ins.

    Args:
        pool: compiles; what it raises is raised by `wait`.
    """

    def __init__(self, pool: Executor) -> None:
        self._pool = pool
        self._results: dict[Any, Any] = {}
        self._compiling: list[Any] = []

    def stand_in(self, program: Any) -> Program:
        """What is called in the place of a jitted program; arguments may be arrays, or their shapes.

        Args:
            program: as `jax.jit` returns it.
        """

        def trace(*arguments: Any) -> Any:
            leaves, tree = jax.tree.flatten(arguments)
            key = (id(program), tree, tuple(_shape_of(leaf) for leaf in leaves))
            if key not in self._results:
                lowered = program.lower(*arguments)
                self._compiling.append(self._pool.submit(lowered.compile))
                self._results[key] = jax.tree.map(
                    lambda result: jax.ShapeDtypeStruct(result.shape, result.dtype), lowered.out_info
                )
            return self._results[key]

        return trace

    def wait(self) -> None:
        """Returns when all is compiled."""
        for compiling in self._compiling:
            compiling.result()


def _shape_of(leaf: Any) -> Any:
    """What of an argument a program depends on; of a static one, all of it."""
    return (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else leaf
