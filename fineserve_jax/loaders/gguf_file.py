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
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fineserve_jax.errors import ModelLoadError

SUPPORTED_TYPES = (
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q2_K",
    "Q3_K",
    "Q4_K",
    "Q5_K",
    "Q6_K",
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
            self._data = np.memmap(path, np.uint8, mode="r")
        except OSError as error:
            raise ModelLoadError(f"cannot read {path}: {error.strerror}") from error
        self.metadata, self.tensors = _parse(_Cursor(self._data, path))

    def read(self, name: str) -> np.ndarray:
        """Tensor `name` dequantised to f32 in its shape; raises ModelLoadError when there is none."""
        if name not in self.tensors:
            raise ModelLoadError(f"{self.path} has no tensor {name!r}; the file is incomplete")
        info = self.tensors[name]
        raw = self._data[info.offset : info.offset + info.size_bytes]
        if info.type == GGMLQuantizationType.F32:
            return raw.view("<f4").reshape(info.shape).copy()
        out = np.empty(math.prod(info.shape), np.float32)
        block, block_bytes = GGML_QUANT_SIZES[info.type]
        step = max(1, _CHUNK_VALUES // block)
        for first in range(0, len(out) // block, step):
            piece = raw[first * block_bytes : (first + step) * block_bytes]
            out[first * block : (first + step) * block] = gguf.dequantize(piece, info.type)
        return out.reshape(info.shape)


class _Cursor:
    """Sequential reads that refuse to pass the end of the file."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.data, self.path, self.position = data, path, 0

    def take(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self.data):
            raise ModelLoadError(
                f"{self.path} is truncated: its header runs past the end of the file "
                f"({len(self.data)} bytes); "
                "download it again"
            )
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
        if kind in _SCALARS:
            layout = _SCALARS[kind]
            return np.frombuffer(self.take(count * struct.calcsize(layout)), layout).tolist()
        if kind == _STRING:
            return self.strings(count)
        return [self.value(kind) for _ in range(count)]

    def strings(self, count: int) -> list[str]:
        """A vocabulary has 10^5 strings: walk a few large pieces instead of slicing the file for each."""
        # Every string takes at least its length, so a count the file cannot hold is refused before the loop.
        if count * 8 > len(self.data) - self.position:
            self.take(count * 8)
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
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.string()
        metadata[key] = cursor.value(cursor.scalar("<I"))
    tensors = [_tensor_info(cursor) for _ in range(tensor_count)]
    alignment = int(metadata.get("general.alignment", 32))
    start = -(-cursor.position // alignment) * alignment
    placed = [dataclasses.replace(info, offset=start + info.offset) for info in tensors]
    _check_extents(path, placed, len(cursor.data))
    return metadata, {info.name: info for info in placed}


def _tensor_info(cursor: _Cursor) -> TensorInfo:
    name, rank = cursor.string(), cursor.scalar("<I")
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


def _check_extents(path: Path, tensors: list[TensorInfo], file_bytes: int) -> None:
    needed = max((info.offset + info.size_bytes for info in tensors), default=0)
    if needed > file_bytes:
        raise ModelLoadError(
            f"{path} is truncated: its tensors need {needed} bytes, the file has {file_bytes}; download it again"
        )
