"""A model's tensors by their usual names, out of files that name and join them in their family's way."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Protocol

import numpy as np

from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.params import shape_mismatch, tensor_shape
from fineserve_jax.models.row_packing import LatestOfThread
from fineserve_jax.models.tensor_layout import Joined, TensorLayout

_NAME = re.compile(r"(model\.layers\.\d+\.)?(.+?)(?:\.(weight|bias))?")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")

NameOf = Callable[[str, str, str, bool], str]
"""Stored name of (layer's prefix or "", part, kind or "", whether it is a stack of experts)."""


class StoredTensors(Protocol):
    """The tensors of a checkpoint as they are called in its files."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor; None when there is none."""

    def read(self, name: str, index: int | None, rows: slice | None) -> np.ndarray:
        """f32: the tensor, or of a stack the matrix or vector `index`; of that the `rows`. None: all."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor lies: in which stored one, and which part of it (see `Joined`)."""

    name: str
    index: int | None = None
    rows: slice | None = None
    transposed: bool = False


class LaidOutTensors:
    """Tensors by the names that `models/params.py` gives them.

    config: the model's.
    layout: its family's, in files of this format.
    stored: the files' tensors.
    name_of: what the files call a tensor.
    """

    def __init__(self, config: ModelConfig, layout: TensorLayout, stored: StoredTensors, name_of: NameOf) -> None:
        self.config, self.layout, self.stored, self.name_of = config, layout, stored, name_of
        self._latest = LatestOfThread()

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None when the files lack it; raises ModelLoadError for a joined one of a wrong shape."""
        place = self._place(name)
        if place is None:
            return None
        stored = self.stored.shape(place.name)
        return stored if place == _Place(place.name) else tensor_shape(self.config, name)

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The values, f32, or those of these rows: neighbours, of q and k whole heads."""
        place = self._place(name)
        assert place is not None, "only tensors that have a shape are read"
        taken = place.rows if rows is None else _within(place.rows, rows)
        if place.transposed:
            whole = self._latest.get(
                f"{place.name} {place.index}", lambda: self.stored.read(place.name, place.index, None).T
            )
            tensor = np.ascontiguousarray(whole[taken])
        else:
            tensor = self.stored.read(place.name, place.index, taken)
        if self.layout.interleaved_rope and name.split(".")[-2] in ("q_proj", "k_proj"):
            return unpermute_heads(tensor, len(tensor) // self.config.head_dim)
        return tensor

    def stored_names(self, names: Collection[str]) -> set[str]:
        """What the files call those of these tensors that they have."""
        return {place.name for name in names if (place := self._place(name))}

    def _place(self, name: str) -> _Place | None:
        match = _NAME.fullmatch(name)
        assert match is not None, f"{name} is a tensor of a model"
        prefix, part, kind = (group or "" for group in match.groups())
        expert = _EXPERT.fullmatch(part)
        pattern = f"{expert[1]}.*.{expert[3]}" if expert else part
        for joined in self.layout.joined:
            if pattern in joined.parts:
                found = self._place_in(joined, prefix, pattern, kind, int(expert[2]) if expert else None)
                if found is not None:
                    return found
        for called in (self.layout.names.get(pattern), pattern):
            if called is not None:
                stored = self.name_of(prefix, called.replace("*", expert[2] if expert else ""), kind, False)
                if self.stored.shape(stored) is not None:
                    return _Place(stored)
        return None

    def _place_in(self, joined: Joined, prefix: str, part: str, kind: str, expert: int | None) -> _Place | None:
        """Where `part` is in a joined tensor; None if the files lack that."""
        stored = self.name_of(prefix, joined.name, kind, expert is not None)
        found = self.stored.shape(stored)
        if found is None:
            return None
        shapes = [tensor_shape(self.config, f"{prefix}{p.replace('*', '0')}.{kind}") for p in joined.parts]
        whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        transposed = joined.transposed and kind == "weight"
        whole = whole[::-1] if transposed else whole
        if expert is not None:
            assert self.config.experts is not None, "a model without experts has no parts of experts"
            whole = (self.config.experts.count, *whole)
        if found != whole:
            raise shape_mismatch(stored, found, whole)
        at = joined.parts.index(part)
        if joined.alternating:
            rows = slice(at, None, len(joined.parts))
        else:
            first = sum(shape[0] for shape in shapes[:at])
            rows = slice(first, first + shapes[at][0])
        return _Place(stored, expert, rows, transposed)


def _within(part: slice | None, rows: slice) -> slice:
    """These rows of a part, as rows of the tensor that it is a part of."""
    if part is None:
        return rows
    first, step = part.start, part.step or 1
    return slice(first + rows.start * step, first + rows.stop * step, step)


def unpermute_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved order (0, d/2, 1, d/2 + 1, ...) to half-rotation order."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)
