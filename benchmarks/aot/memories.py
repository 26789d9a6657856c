"""Memory that an interpreted kernel reads and writes: which addresses an access touches, counted by operand.

Only 32-bit integers keep their values: tables and counters decide where a kernel goes. Everything else reads as zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Force = Any  # Callable[[Any], np.ndarray]: an interpreter's value as a numpy array


@dataclass
class Counts:
    """Bytes that kernels read and wrote of one operand of a `pallas_call`."""

    name: str
    dtype: np.dtype
    size: int
    read: int = 0
    written: int = 0


@dataclass
class Memory:
    """An array that a kernel refers to, or a view of one.

    Attributes:
        shape: of the view.
        cells: the values, flat; None if they are not kept.
        addresses: i64[shape], the cells that make up the view; None where values are not kept: how many is enough.
        counts: whose bytes accesses are; None for memory on the chip, where accesses cost no transfer.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    cells: np.ndarray | None = None
    addresses: np.ndarray | None = None
    counts: Counts | None = None

    @classmethod
    def of(cls, shape: Sequence[int], dtype: Any, value: Any = None, counts: Counts | None = None) -> "Memory":
        """New memory; holds `value`, or zeros."""
        dtype, shape = np.dtype(dtype), tuple(shape)
        if not keeps_values(dtype):
            return cls(dtype, shape, counts=counts)
        size = math.prod(shape)
        cells = np.zeros(size, dtype) if value is None else np.array(value, dtype).reshape(-1)
        return cls(dtype, shape, cells, np.arange(size).reshape(shape), counts)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def view(self, transforms: Sequence[Any], force: Force) -> "Memory":
        """The part that Pallas's `transforms` (indexers and reshapes of a reference) pick out."""
        shape, addresses = self.shape, self.addresses
        for transform in transforms:
            if hasattr(transform, "indices"):
                if addresses is not None:
                    addresses = _index(addresses, transform.indices, force)
                shape = tuple(transform.get_indexer_shape()) if transform.indices else shape
            elif hasattr(transform, "shape") and math.prod(transform.shape) == math.prod(shape):
                shape = tuple(transform.shape)
                addresses = None if addresses is None else addresses.reshape(shape)
            else:
                raise NotImplementedError(f"the traffic of a reference seen through {transform!r} is not counted yet")
        return Memory(self.dtype, shape, self.cells, addresses, self.counts)

    def load(self, mask: np.ndarray | None = None) -> np.ndarray:
        """Reads the view, and counts what the mask lets through."""
        if self.counts is not None:
            self.counts.read += self._let_through(mask)
        if self.cells is None or self.addresses is None:
            return np.broadcast_to(np.zeros((), self.dtype), self.shape)
        values = self.cells[self.addresses.clip(0, self.cells.size - 1)]
        return values if mask is None else np.where(mask, values, 0).astype(self.dtype)

    def store(self, value: Any, force: Force, mask: np.ndarray | None = None) -> None:
        """Writes the view, and counts what the mask lets through."""
        if self.counts is not None:
            self.counts.written += self._let_through(mask)
        if self.cells is not None and self.addresses is not None:
            where = np.broadcast_to(True if mask is None else mask, self.shape)
            self.cells[self.addresses[where]] = np.broadcast_to(force(value), self.shape)[where]

    def copy_to(self, target: "Memory") -> None:
        """An asynchronous copy, taken to be done at once."""
        if self.counts is not None:
            self.counts.read += self.nbytes
        if target.counts is not None:
            target.counts.written += self.nbytes
        if target.cells is not None and target.addresses is not None:
            kept = None if self.cells is None or self.addresses is None else self.cells[self.addresses.reshape(-1)]
            target.cells[target.addresses.reshape(-1)] = 0 if kept is None else kept

    def _let_through(self, mask: np.ndarray | None) -> int:
        if mask is None:
            return self.nbytes
        return int(np.count_nonzero(np.broadcast_to(mask, self.shape))) * self.dtype.itemsize


def keeps_values(dtype: np.dtype) -> bool:
    """Whether memory of this type decides where a kernel goes."""
    return dtype.kind in "iub" and dtype.itemsize == 4


def _index(addresses: np.ndarray, indices: Sequence[Any], force: Force) -> np.ndarray:
    """Addresses that an NDIndexer picks: arrays and numbers broadcast to the leading axes, slices follow in order."""
    forced = [None if _is_slice(index) else force(index) for index in indices]
    leading = np.broadcast_shapes(*(array.shape for array in forced if array is not None))
    num_slices = sum(array is None for array in forced)
    picked, passed = [], 0
    for axis, (index, array) in enumerate(zip(indices, forced, strict=True)):
        if array is None:
            passed += 1
            places = int(force(index.start)) + index.stride * np.arange(index.size)
            places = places.reshape((index.size, *[1] * (num_slices - passed)))
        else:
            places = np.broadcast_to(array, leading).reshape((*leading, *[1] * num_slices))
        # What lies outside is masked, or an error of the kernel that its own tests catch.
        picked.append(np.clip(places, 0, addresses.shape[axis] - 1))
    return addresses[tuple(picked)] if picked else addresses


def _is_slice(index: Any) -> bool:
    return all(hasattr(index, name) for name in ("start", "size", "stride"))
