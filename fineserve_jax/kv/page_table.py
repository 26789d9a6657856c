"""The page table: where each page lies, and its reference count.

Whoever holds a page (a request, or several that share a prefix) holds its *handle*, a small number that stays the same
for as long as the page lives:

    handle      0    1    2    3    4
    unit        120  -    840  36   -        first unit in the arena; 0: the handle is not in use
    ref_count   1    -    3    0    -        0: an evictable page, which only the prefix cache keeps

So moving a page to another place in the arena changes one number here, and nobody who holds it notices.
"""

from array import array
from collections.abc import Iterable, Sequence

import numpy as np

from fineserve_jax.kv.errors import PageError

Handles = Sequence[int]


FEW = 32
"""Up to so many pages a loop is faster than numpy."""


class PageTable:
    """Handles of pages. Nine bytes a page; handles that became free are used again first."""

    def __init__(self) -> None:
        self.units = array("i")
        self.ref_counts = array("i")
        self.tags = bytearray()
        self._free = array("i")

    def __len__(self) -> int:
        """Handles in use."""
        return len(self.units) - len(self._free)

    def add(self, units: Sequence[int], tag: int) -> "array[int]":
        """Handles of new pages, each with the reference count 1.

        Args:
            units: first units.
            tag: of the pages' class, see `kv/slab_pool.py`.
        """
        reused = min(len(units), len(self._free))
        handles = self._free[len(self._free) - reused :]
        del self._free[len(self._free) - reused :]
        if reused > FEW:
            which = np.array(handles)
            _view(self.units)[which], _view(self.ref_counts)[which], _view(self.tags)[which] = units[:reused], 1, tag
        else:
            for handle, unit in zip(handles, units, strict=False):
                self.units[handle], self.ref_counts[handle], self.tags[handle] = unit, 1, tag
        new = units[reused:]
        handles.extend(range(len(self.units), len(self.units) + len(new)))
        self.units.extend(new)
        self.ref_counts.extend(array("i", [1]) * len(new))
        self.tags.extend(bytes([tag]) * len(new))
        return handles

    def incref(self, handles: Iterable[int]) -> None:
        """Raise the reference count of each page by one."""
        ref_counts = self.ref_counts
        for handle in handles:
            ref_counts[handle] += 1

    def decref(self, handles: Handles) -> Handles:
        """Lower the reference count of each page by one; the pages whose count came to 0, which keep their places.

        Raises:
            PageError: a page whose reference count is 0 already.
        """
        if len(handles) > FEW and len(set(handles)) == len(handles):
            which, ref_counts = np.array(handles), _view(self.ref_counts)
            left = ref_counts[which] - 1
            if left.min() >= 0:
                ref_counts[which] = left
                return _numbers(which[left == 0])
        unreferenced = []
        for handle in handles:
            count = self.ref_counts[handle] - 1
            if count < 0:
                raise PageError(f"page {handle} is released by someone who does not hold it; release it once")
            self.ref_counts[handle] = count
            if not count:
                unreferenced.append(handle)
        return unreferenced

    def remove(self, handles: Handles) -> Handles:
        """Forget pages whose reference count is 0; the first units they had."""
        if len(handles) > FEW:
            which, all_units = np.array(handles, np.int32), _view(self.units)
            units = _numbers(all_units[which])
            all_units[which] = 0
            _view(self.tags)[which] = 0
            self._free.frombytes(which.tobytes())
            return units
        few = [self.units[handle] for handle in handles]
        for handle in handles:
            self.units[handle] = self.tags[handle] = 0
        self._free.extend(handles)
        return few

    def by_tag(self, handles: Handles) -> dict[int, Handles]:
        """Handles by the tag of their pages' class, in the order of `handles`."""
        if len(handles) > FEW:
            which = np.array(handles)
            tags = _view(self.tags)[which]
            if (tags == tags[0]).all():
                return {int(tags[0]): handles}
            return {tag: _numbers(which[tags == tag]) for tag in np.flatnonzero(np.bincount(tags)).tolist()}
        found: dict[int, list[int]] = {}
        for handle in handles:
            found.setdefault(self.tags[handle], []).append(handle)
        return dict(found)

    def units_of(self, handles: Handles) -> list[int]:
        """First units of pages, in the order of `handles`."""
        units = self.units
        if len(handles) > FEW:
            return _view(units)[np.array(handles)].tolist()
        return [units[handle] for handle in handles]


def _view(numbers: "array[int] | bytearray") -> np.ndarray:
    """The same memory, which must not grow while the view is there."""
    return np.frombuffer(numbers, np.uint8 if isinstance(numbers, bytearray) else np.int32)


def _numbers(numbers: np.ndarray) -> "array[int]":
    return array("i", numbers.astype(np.int32).tobytes())
