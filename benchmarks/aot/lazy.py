"""Values that are computed when somebody asks: index arithmetic in numpy, everything else by JAX."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

SMALL = 4096  # elements of an integer that is worth computing at once


class Later:
    """A value that is computed when somebody asks."""

    __slots__ = ("compute", "value")

    def __init__(self, compute: Callable[[], Any]) -> None:
        self.compute: Callable[[], Any] | None = compute
        self.value: Any = None

    def get(self) -> Any:
        if self.compute is not None:
            self.value, self.compute = self.compute(), None
        return self.value


def force(value: Any) -> np.ndarray:
    """A value as a numpy array."""
    value = value.get() if isinstance(value, Later) else value
    return np.asarray(value)


def _trunc_divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if a.dtype.kind == "f":
        return a / b
    return np.where(b == 0, -1, np.sign(a) * np.sign(b) * (abs(a) // np.where(b == 0, 1, abs(b)))).astype(a.dtype)


def _spread(x: np.ndarray, *, shape: Sequence[int], broadcast_dimensions: Sequence[int], **_: Any) -> np.ndarray:
    sizes = [1] * len(shape)
    for axis, size in zip(broadcast_dimensions, x.shape, strict=True):
        sizes[axis] = size
    return np.broadcast_to(x.reshape(sizes), shape)


def _iota(*, dtype: Any, shape: Sequence[int], dimension: int, **_: Any) -> np.ndarray:
    sizes = [size if axis == dimension else 1 for axis, size in enumerate(shape)]
    return np.broadcast_to(np.arange(shape[dimension], dtype=dtype).reshape(sizes), shape)


def _elementwise(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *inputs, **_: function(*inputs)


# Index arithmetic, much faster in numpy than through JAX.
ARITHMETIC: dict[str, Callable[..., Any]] = {
    "add": _elementwise(np.add),
    "sub": _elementwise(np.subtract),
    "mul": _elementwise(np.multiply),
    "div": _elementwise(_trunc_divide),
    "rem": _elementwise(np.fmod),
    "min": _elementwise(np.minimum),
    "max": _elementwise(np.maximum),
    "clamp": _elementwise(lambda low, x, high: np.clip(x, low, high)),
    "and": _elementwise(np.bitwise_and),
    "or": _elementwise(np.bitwise_or),
    "not": _elementwise(np.invert),
    "lt": _elementwise(np.less),
    "le": _elementwise(np.less_equal),
    "gt": _elementwise(np.greater),
    "ge": _elementwise(np.greater_equal),
    "eq": _elementwise(np.equal),
    "ne": _elementwise(np.not_equal),
    "select_n": _elementwise(
        lambda which, *choices: np.choose(which, choices) if choices[2:] else np.where(which, *choices[::-1])
    ),
    "stop_gradient": _elementwise(lambda x: x),
    "multiple_of": _elementwise(lambda x: x),
    "max_contiguous": _elementwise(lambda x: x),
    "broadcast_in_dim": _spread,
    "iota": _iota,
    "reshape": lambda x, *, new_sizes, **_: x.reshape(new_sizes),
    "squeeze": lambda x, *, dimensions, **_: np.squeeze(x, dimensions),
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "reduce_or": lambda x, *, axes, **_: np.any(x, axes),
    "reduce_and": lambda x, *, axes, **_: np.all(x, axes),
}


def later_results(eqn: Any, inputs: list[Any]) -> list[Any]:
    """The results of an equation without side effects."""
    fast = ARITHMETIC.get(eqn.primitive.name)
    if fast is not None:
        quick = fast
        return [Later(lambda: quick(*(force(value) for value in inputs), **eqn.params))]

    def compute() -> Sequence[Any]:
        results = eqn.primitive.bind(*(jax.numpy.asarray(force(value)) for value in inputs), **eqn.params)
        return results if eqn.primitive.multiple_results else [results]

    together = Later(compute)

    def part(index: int) -> Later:
        return Later(lambda: np.asarray(together.get()[index]))

    return [part(index) for index in range(len(eqn.outvars))]


def settle(variables: Sequence[Any], carry: Sequence[Any]) -> list[Any]:
    """Computes the small integers of a loop's carry, lest asking for the last one recurse through all turns."""
    return [
        force(value)
        if value is not None and variable.aval.dtype.kind in "iub" and variable.aval.size <= SMALL
        else value
        for variable, value in zip(variables, carry, strict=True)
    ]
