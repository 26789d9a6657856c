"""GGUF files in parts (`model-00001-of-00003.gguf`), as one file.

The first part has the metadata; each has some of the tensors, and says its number, how many parts and how many tensors
there are in all (`split.no`, from 0, `split.count` and `split.tensors.count`).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_schema import GGUFGeneralKeys, GGUFSplitKeys
from fineserve_jax.loaders.known_keys import check_keys

_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


class GGUFParts(GGUFFile):
    """Several files as one. path: the first part's."""

    def __init__(self, parts: list[GGUFFile]) -> None:
        self.path = parts[0].path
        self.metadata = parts[0].metadata
        self._part_of = {name: part for part in parts for name in part.tensors}
        self.tensors = {name: part.tensors[name] for name, part in self._part_of.items()}

    def read(self, name: str, index: int | None = None, rows: slice | None = None) -> np.ndarray:
        """See `GGUFFile.read`."""
        if name not in self._part_of:
            raise ModelLoadError(f"{self.path} and its other parts have no tensor {name!r}; the model is incomplete")
        return self._part_of[name].read(name, index, rows)


def open_gguf(path: Path) -> GGUFFile:
    """A GGUF file, with the other parts of the model if it is one of several, whichever of them `path` is.

    Raises ModelLoadError for a file that is damaged, parts that are missing, and parts that do not belong together.
    """
    file = GGUFFile(path)
    count = check_keys(GGUFSplitKeys, file.metadata, f"{path}: ").count or 1
    if count == 1:
        return file
    match = _PART.fullmatch(path.name)
    if match is None or int(match[3]) != count:
        raise ModelLoadError(
            f"{path} is one of {count} parts of a model, which are found by their names only: give them the names that "
            f"they were published with, such as model-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(f"{match[1]}-{number + 1:05}-of-{count:05}.gguf") for number in range(count)]
    if missing := [other.name for other in paths if not other.exists()]:
        raise ModelLoadError(
            f"{path} is one of {count} parts of a model, and {len(missing)} of them are not beside it: "
            f"{', '.join(missing[:4])}; download them into the same folder"
        )
    parts = [file if other == path else GGUFFile(other) for other in paths]
    _check_parts(parts)
    return GGUFParts(parts)


def _check_parts(parts: list[GGUFFile]) -> None:
    """Raises ModelLoadError unless each part is the one that its name says, of one model."""
    stated = [check_keys(GGUFSplitKeys, part.metadata, f"{part.path}: ") for part in parts]
    architectures = [check_keys(GGUFGeneralKeys, part.metadata, f"{part.path}: ").architecture for part in parts]
    for number, (part, keys) in enumerate(zip(parts, stated, strict=True)):
        if (keys.number, keys.count) != (number, len(parts)):
            raise ModelLoadError(
                f"{part.path} says that it is part {_from_one(keys.number)} of {keys.count}, its name says "
                f"{number + 1} of {len(parts)}; the parts are mixed up, download them again"
            )
        if keys.tensors != stated[0].tensors or architectures[number] not in (None, architectures[0]):
            raise ModelLoadError(f"{part.path} and {parts[0].path} are parts of different models; download them again")
    names = [name for part in parts for name in part.tensors]
    if twice := {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else set():
        raise ModelLoadError(f"{parts[0].path}: tensor {min(twice)!a} is in several parts; they do not belong together")
    if stated[0].tensors not in (None, len(names)):
        raise ModelLoadError(
            f"{parts[0].path} says that all parts have {stated[0].tensors} tensors, they have {len(names)}; "
            "they do not belong together, download them again"
        )


def _from_one(number: int | None) -> str:
    return "(not stated)" if number is None else str(number + 1)
