"""The tensors of one quantised matrix of a Hugging Face checkpoint."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.safetensors_files import SafetensorsFiles


class MatrixParts:
    """Tensors whose names begin alike: `{module}.qweight`, `{module}.scales` and so on, called by their ends.

    module: the name of the layer that the matrix belongs to.
    """

    def __init__(self, files: SafetensorsFiles, module: str) -> None:
        self._files, self.module = files, module

    def __contains__(self, end: object) -> bool:
        return f"{self.module}.{end}" in self._files.tensors

    def dtype(self, end: str) -> str:
        """The type's name in the file's header."""
        return self._files.tensors[f"{self.module}.{end}"].dtype

    def shape(self, end: str) -> tuple[int, ...]:
        """The tensor's shape."""
        return self._files.tensors[f"{self.module}.{end}"].shape

    def sides(self, end: str) -> tuple[int, int]:
        """The shape of a tensor that is a matrix with something in it; raises ModelLoadError for another one."""
        if end not in self:
            raise self.error(f"has no {end}")
        shape = self.shape(end)
        if len(shape) != 2 or 0 in shape:
            raise self.error(f"has {end} of shape {list(shape)}, must be a matrix")
        return shape[0], shape[1]

    def read(self, end: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or these rows, as stored."""
        return self._files.read(f"{self.module}.{end}", rows=rows)

    def read_f32(self, end: str, rows: slice | None = None) -> np.ndarray:
        """The tensor, or these rows, as f32."""
        return self.read(end, rows).astype(np.float32)

    def require(self, end: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
        """Raises ModelLoadError unless the tensor is there, of that shape and one of these types."""
        if end not in self:
            raise self.error(f"has no {end}")
        if self.shape(end) != shape or self.dtype(end) not in dtypes:
            raise self.error(
                f"has {end} {self.dtype(end)}{list(self.shape(end))}, must be {' or '.join(dtypes)}{list(shape)}"
            )

    def error(self, problem: str) -> ModelLoadError:
        """What is said of tensors that do not fit together."""
        return ModelLoadError(
            f"{self._files.directory}: the quantised matrix {self.module} {problem}; the checkpoint is damaged, or "
            "packed in a way that is not supported"
        )


class RowSource(Protocol):
    """A quantised matrix, ready to be read."""

    def rows(self, rows: slice) -> np.ndarray:
        """These rows of the matrix `[out, in]`, f32."""


class Method(Protocol):
    """A way of quantising, with the settings of a checkpoint."""

    @property
    def ends(self) -> tuple[str, ...]:
        """Ends of names of all tensors that belong to a matrix or to its activations."""

    def applies(self, parts: MatrixParts) -> bool:
        """Whether the matrix is quantised; if not, it is stored as others are."""

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        """The matrix's shape; raises ModelLoadError where its tensors do not fit together."""

    def open(self, parts: MatrixParts) -> RowSource:
        """Reads what all rows need."""


FLOATS = ("F32", "F16", "BF16")


def settings_error(method: str, problem: str) -> ModelLoadError:
    """What is said of settings that are not supported."""
    return ModelLoadError(
        f"the checkpoint is quantised ({method}), and in its quantization_config {problem}, which is not supported; "
        "use one that is quantised in the usual way, or the unquantised checkpoint with a precision by weights=..."
    )
