"""The safetensors files of a directory, one or several with an index: their tensors as they are stored, rows at a time.

    length of the header u64, header JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes

A header is checked by the `safetensors` package. Bytes are read here: the package maps a file into memory, and all that
was read of it then counts as this process's memory.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_schema import HFIndex
from fineserve_jax.loaders.json_file import read_json
from fineserve_jax.loaders.known_keys import check_keys

_INDEX = "model.safetensors.index.json"
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
"""Types of tensors that can be read, by their names in a header."""


@dataclasses.dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file. dtype: its name in the header. offset: bytes from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    descriptor: int
    offset: int
    path: Path


class SafetensorsFiles:
    """The tensors of a directory's model*.safetensors, or of the files that its index names.

    tensors: by name.

    Raises ModelLoadError for files that are absent or damaged, and for a tensor that is in two of them.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        paths = _tensor_files(directory)
        found = [(name, tensor) for path in paths for name, tensor in self._open(path).items()]
        self.tensors = dict(found)
        twice = sorted(name for name, count in Counter(name for name, _ in found).items() if count > 1)
        if twice:
            raise ModelLoadError(
                f"{directory}: tensor {twice[0]!a} is in more than one of {len(paths)} files "
                f"({', '.join(path.name for path in paths)}); keep one set of weights"
            )

    def read(self, name: str, index: int | None = None, rows: slice | None = None) -> np.ndarray:
        """The tensor as it is stored, or a part of it.

        index: the matrix, or vector, of that number of a stack.
        rows: these along the first axis of that.

        Raises ModelLoadError for a type that cannot be read.
        """
        tensor = self.tensors[name]
        if tensor.dtype not in DTYPES:
            raise ModelLoadError(
                f"{self.directory}: tensor {name} is of type {tensor.dtype}, which is not supported; "
                f"supported: {', '.join(DTYPES)}"
            )
        dtype, shape, first = np.dtype(DTYPES[tensor.dtype]), tensor.shape, 0
        if index is not None:
            shape = shape[1:]
            first = index * math.prod(shape)
        if not shape:
            return _values(tensor, dtype, first, 1).reshape(())
        start, stop, step = (rows or slice(None)).indices(shape[0])
        width = math.prod(shape[1:])
        values = _values(tensor, dtype, first + start * width, max(stop - start, 0) * width)
        return values.reshape(-1 if width else max(stop - start, 0), *shape[1:])[::step]

    def _open(self, path: Path) -> dict[str, StoredTensor]:
        try:
            with safe_open(path, framework="numpy"):
                pass
            descriptor = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, descriptor)
            length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
            header: dict[str, Any] = json.loads(os.pread(descriptor, length, 8))
        except FileNotFoundError as error:
            raise ModelLoadError(f"{path} is missing, although the checkpoint's index names it; download it") from error
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{path} is not a readable safetensors file: {error}; download it again") from error
        header.pop("__metadata__", None)
        return {
            name: StoredTensor(
                entry["dtype"], tuple(entry["shape"]), descriptor, 8 + length + entry["data_offsets"][0], path
            )
            for name, entry in header.items()
        }


def _values(tensor: StoredTensor, dtype: np.dtype[Any], first: int, count: int) -> np.ndarray:
    size = count * dtype.itemsize
    raw = os.pread(tensor.descriptor, size, tensor.offset + first * dtype.itemsize) if size else b""
    while 0 < len(raw) < size:  # one read gives 2 GiB at most
        more = os.pread(tensor.descriptor, size - len(raw), tensor.offset + first * dtype.itemsize + len(raw))
        if not more:
            break
        raw += more
    if len(raw) != size:
        raise ModelLoadError(f"{tensor.path} has become shorter while it was read; download it again")
    return np.frombuffer(raw, dtype)


def _tensor_files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.exists():
        names = sorted(set(check_keys(HFIndex, read_json(index), f"{_INDEX}: ").weight_map.values()))
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("model*.safetensors"))
    if not files:
        raise ModelLoadError(
            f"{directory} has no model*.safetensors; PyTorch *.bin files must be converted to safetensors first"
        )
    return files
