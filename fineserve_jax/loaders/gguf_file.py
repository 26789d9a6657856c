"""GGUF files: metadata, the table of tensors, and dequantised tensor values.

    magic "GGUF", version u32, tensor count u64, metadata count u64
    metadata: (name, type, value) ...
    tensors:  (name, rank u32, extents u64 ..., type u32, offset u64) ...
    padding to the alignment, then tensor data at the stated offsets

The header is parsed here rather than by `gguf.GGUFReader`, which takes seconds over a vocabulary and reads
before it checks; block formats and their dequantisation are the `gguf` package's.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import struct
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.known_keys import shown

SUPPORTED_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
_CHUNK_VALUES = 1 << 18  # dequantise pieces that stay in cache

# GGUF value types: 0..7 and 10..12 are numbers, 8 a string, 9 an array.
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_STRING, _ARRAY = 8, 9
_MAX_RANK = 4
_MAX_ARRAY_VALUES = 1 << 22  # of all arrays together; a vocabulary of 2^18 tokens has 1.3 million
_MAX_ALIGNMENT = 1 << 20
_SMALLEST_KEY, _SMALLEST_TENSOR = 13, 24  # bytes of a header entry


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """A row of the tensor table. shape: in numpy's order. offset: bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    size_bytes: int


class GGUFFile:
    """An opened, checked GGUF file.

    metadata: every key and value of the header.
    tensors: the tensor table by name; every tensor is of a supported type and lies inside the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.stat().st_size < 24:
                raise ModelLoadError(f"{path} is not a GGUF file: it has {path.stat().st_size} bytes only")
            self._descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
            # What is mapped and read counts as this process's memory: only the header is mapped, for as long as this.
            self.metadata, self.tensors = _parse(_Cursor(np.memmap(path, np.uint8, mode="r"), path))
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error

    def read(self, name: str, index: int | None = None, rows: slice | None = None) -> np.ndarray:
        """Tensor `name` dequantised to f32 in its shape, or a part of it.

        index: the matrix, or vector, of that number of a stack.
        rows: these along the first axis of that.

        Raises ModelLoadError when there is no such tensor.
        """
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path} has no tensor {name!r}; the file is incomplete")
        info = self.tensors[name]
        shape, first = info.shape, 0
        if index is not None:
            shape = shape[1:]
            first = index * math.prod(shape)
        start, stop, step = (rows or slice(None)).indices(shape[0])
        if len(shape) > 1:
            width = math.prod(shape[1:])
            values = self._values(info, first + start * width, first + stop * width)
            return values.reshape(-1, *shape[1:])[::step]
        return self._values(info, first, first + shape[0])[start:stop:step]

    def _values(self, info: TensorInfo, start: int, stop: int) -> np.ndarray:
        """Values number `start` to `stop`, which are whole blocks, f32."""
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        out = np.empty(max(stop - start, 0), np.float32)
        step = max(1, _CHUNK_VALUES // block) * block
        for at in range(start, stop, step):
            count = min(step, stop - at)
            raw = self._bytes(info.offset + at // block * block_bytes, count // block * block_bytes)
            is_f32 = info.type == GGMLQuantizationType.F32
            out[at - start : at - start + count] = raw.view("<f4") if is_f32 else gguf.dequantize(raw, info.type)
        return out

    def _bytes(self, offset: int, size: int) -> np.ndarray:
        raw = os.pread(self._descriptor, size, offset)
        if len(raw) != size:
            raise ModelLoadError(f"{self.path} has become shorter while it was read; download it again")
        return np.frombuffer(raw, np.uint8)


class _Cursor:
    """Sequential reads that refuse to pass the end of the file."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0
        self._values_left = _MAX_ARRAY_VALUES

    def require(self, size: int) -> int:
        """The position `size` bytes further on; raises ModelLoadError when the file ends before it."""
        end = self.position + size
        if end > len(self.data):
            raise ModelLoadError(
                f"{self.path} is truncated: its header runs past the end of the file "
                f"({len(self.data)} bytes); "
                "download it again"
            )
        return end

    def take(self, size: int) -> bytes:
        end = self.require(size)
        taken = self.data[self.position : end].tobytes()
        self.position = end
        return taken

    def scalar(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def string(self) -> str:
        return self.take(self.scalar("<Q")).decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array()
        if kind not in _SCALARS:
            raise ModelLoadError(f"{self.path} holds a metadata value of unknown type {kind}; the file is damaged")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list[Any]:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        layout = _SCALARS.get(kind, "<Q")  # a string takes at least its length
        self.require(count * struct.calcsize(layout))
        self._values_left -= count
        if self._values_left < 0:
            raise ModelLoadError(
                f"{self.path} holds metadata arrays of more than {_MAX_ARRAY_VALUES} values together; "
                "no vocabulary is that large, the file is damaged"
            )
        if kind in _SCALARS:
            return np.frombuffer(self.take(count * struct.calcsize(layout)), layout).tolist()
        if kind == _STRING:
            return self.strings(count)
        what = "an array inside an array" if kind == _ARRAY else f"an array of unknown type {kind}"
        raise ModelLoadError(f"{self.path} holds {what} in its metadata; the file is damaged")

    def strings(self, count: int) -> list[str]:
        """A vocabulary has 10^5 strings: walk a few large pieces instead of slicing the file for each."""
        read_length = struct.Struct("<Q").unpack_from
        blob, at, found = b"", 0, []
        for _ in range(count):
            if at + 8 > len(blob) or at + 8 + read_length(blob, at)[0] > len(blob):
                self.position += at
                needed = 8 + self._peek_length()
                size = max(needed, min(1 << 22, len(self.data) - self.position))
                blob, at = self.data[self.position : self.position + size].tobytes(), 0
                if len(blob) < needed:
                    self.take(needed)
            end = at + 8 + read_length(blob, at)[0]
            found.append(blob[at + 8 : end].decode("utf-8", errors="replace"))
            at = end
        self.position += at
        return found

    def _peek_length(self) -> int:
        length = self.scalar("<Q")
        self.position -= 8
        return int(length)


def _parse(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    path = cursor.path
    magic, version = cursor.take(4), cursor.scalar("<I")
    if magic != b"GGUF":
        raise ModelLoadError(f"{path} is not a GGUF file: it begins with {magic!r} instead of b'GGUF'")
    if version not in (2, 3):
        # A byte-swapped version number is how a big-endian file looks from here.
        kind = "big-endian" if version >> 16 else f"version {version}"
        raise ModelLoadError(f"{path} is a {kind} GGUF file; little-endian versions 2 and 3 are supported")
    tensor_count, metadata_count = cursor.scalar("<Q"), cursor.scalar("<Q")
    cursor.require(metadata_count * _SMALLEST_KEY + tensor_count * _SMALLEST_TENSOR)
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        if key in metadata:
            raise ModelLoadError(f"{path} has the metadata key {key!a} twice; the file is damaged")
        metadata[key] = cursor.value(cursor.scalar("<I"))
    tensors = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = _alignment(path, metadata)
    start = -(-cursor.position // alignment) * alignment
    placed = [dataclasses.replace(info, offset=start + info.offset) for info in tensors]
    _check_places(path, placed, len(cursor.data))
    return metadata, {info.name: info for info in placed}


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if type(value) is not int or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise ModelLoadError(
            f"{path}: general.alignment is {shown(value)}, must be a power of two up to {_MAX_ALIGNMENT}"
        )
    return value


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name, rank = cursor.string(), cursor.scalar("<I")
    if not 1 <= rank <= _MAX_RANK:
        raise ModelLoadError(
            f"{cursor.path}: tensor {name!a} has {rank} dimensions, the format allows 1 to {_MAX_RANK}"
        )
    extents = [int(cursor.scalar("<Q")) for _ in range(rank)]
    type_id, offset = cursor.scalar("<I"), int(cursor.scalar("<Q"))
    known = {int(kind): kind for kind in GGMLQuantizationType}
    label = known[type_id].name if type_id in known else f"number {type_id}"
    if label not in SUPPORTED_TYPES:
        raise ModelLoadError(
            f"{cursor.path}: tensor {name} is of type {label}, which is not supported; "
            f"supported: {', '.join(SUPPORTED_TYPES)}"
        )
    block, block_bytes = GGML_QUANT_SIZES[known[type_id]]
    if extents and extents[0] % block:
        raise ModelLoadError(f"{cursor.path}: rows of tensor {name} ({extents[0]}) are no multiple of {block} values")
    size = math.prod(extents) // block * block_bytes
    return TensorInfo(name, tuple(reversed(extents)), known[type_id], offset, size)


def _check_places(path: Path, tensors: list[TensorInfo], file_bytes: int) -> None:
    """Every tensor has a name of its own, and bytes of its own inside the file."""
    needed = max((info.offset + info.size_bytes for info in tensors), default=0)
    if needed > file_bytes:
        raise ModelLoadError(
            f"{path} is truncated: its tensors need {needed} bytes, the file has {file_bytes}; download it again"
        )
    names = Counter(info.name for info in tensors)
    if twice := [name for name, count in names.items() if count > 1]:
        raise ModelLoadError(f"{path} has tensor {twice[0]!a} twice; the file is damaged")
    ordered = sorted(tensors, key=lambda info: info.offset)
    for before, after in itertools.pairwise(ordered):
        if before.offset + before.size_bytes > after.offset:
            raise ModelLoadError(
                f"{path}: tensors {before.name!a} and {after.name!a} share bytes of the file; the file is damaged"
            )
