"""Encoding matrices a few rows at a time, so that a model is never in memory as float32, nor is a matrix of it."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, TypeVar

import jax
import numpy as np

from fineserve_jax.models.weight_formats import WeightFormat

Value = TypeVar("Value")
_VALUES_AT_A_TIME = 1 << 19
_ALIGNMENT = 64  # bytes; JAX keeps an array of the host as it is only if it begins at a multiple of this


class Rows(Protocol):
    """What matrices are read from."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """These rows of a matrix, f32; None: all."""


def pack_rows(
    fmt: WeightFormat, source: Rows, shapes: Sequence[tuple[str, tuple[int, ...]]], unit: int = 1
) -> dict[str, np.ndarray]:
    """Matrices of one width, one below the other, encoded as one: the arrays of `fmt`.

    shapes: names, and the shape of each.
    unit: rows are read in multiples of this many, where a matrix has that many.
    """
    inner = shapes[0][1][1]
    declared = fmt.declare(sum(shape[0] for _, shape in shapes), inner)
    packed = {key: aligned_empty(array.shape, np.dtype(array.dtype)) for key, array in declared.items()}
    at = 0
    for name, shape in shapes:
        for rows in _pieces(shape[0], max(unit, _VALUES_AT_A_TIME // inner // unit * unit)):
            for key, array in fmt.pack(source.read(name, rows)).items():
                packed[key][at + rows.start : at + rows.stop] = array
        at += shape[0]
    return packed


def to_device(array: np.ndarray) -> jax.Array:
    """The array on JAX's default device; where that is the host, the same memory if possible. It must not change."""
    return jax.device_put(array, may_alias=True)


def together(jobs: Mapping[str, Callable[[], Value]]) -> dict[str, Value]:
    """What each job gives, by a few threads; when one raises, those that have not begun are left out."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)


class LatestOfThread:
    """Keeps the latest value of each thread, for a source whose rows are not to be had without the whole matrix."""

    def __init__(self) -> None:
        self._held = threading.local()

    def get(self, key: str, make: Callable[[], Value]) -> Value:
        """The value of `key`: what this thread made last, if that was for the same key."""
        if getattr(self._held, "key", None) != key:
            self._held.value = None  # the one before is not kept while the next is made
            self._held.value, self._held.key = make(), key
        return self._held.value


def _pieces(count: int, step: int) -> Iterator[slice]:
    return (slice(at, min(at + step, count)) for at in range(0, count, step))


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """An array whose memory JAX can take as it is, see `to_device`; its values are whatever was there."""
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.empty(size + _ALIGNMENT, np.uint8)
    first = -raw.ctypes.data % _ALIGNMENT
    return raw[first : first + size].view(dtype).reshape(shape)
