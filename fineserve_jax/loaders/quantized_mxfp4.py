"""Experts of gpt-oss in MXFP4: 4-bit floats with a power of two for each 32 of a row (OCP Microscaling formats).

NAME_blocks u8[experts, out, in / 32, 16]    two values of neighbouring inputs, the lower four bits first (e2m1)
NAME_scales u8[experts, out, in / 32]        exponents of two, 127 more than they are
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.quantization import PlainTensors
from fineserve_jax.loaders.quantized_fp4 import E2M1, exponent_scales

_BLOCKS, _SCALES = "_blocks", "_scales"


class MXFP4Stacks:
    """The tensors of a checkpoint as f32: a stack is called by the name of its blocks, and of shape [experts, out, in].

    tensors: those that are not stored so.
    """

    def __init__(self, tensors: PlainTensors) -> None:
        self.tensors = tensors

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None when no file has it; raises ModelLoadError for blocks and scales of other shapes."""
        if not name.endswith(_BLOCKS) or name not in self.tensors.files.tensors:
            return self.tensors.shape(name)
        blocks = self.tensors.files.tensors[name]
        scales = self.tensors.files.tensors.get(name.removesuffix(_BLOCKS) + _SCALES)
        fits = len(blocks.shape) == 4 and blocks.shape[3] == 16 and blocks.dtype == "U8"
        if scales is None or not fits or scales.shape != blocks.shape[:3] or scales.dtype not in ("U8", "F8_E8M0"):
            found = "none" if scales is None else f"{scales.dtype}{list(scales.shape)}"
            raise ModelLoadError(
                f"{self.tensors.files.directory}: {name} is {blocks.dtype}{list(blocks.shape)}, and its scales are "
                f"{found}; MXFP4 has U8[experts, out, in / 32, 16] and U8[experts, out, in / 32]"
            )
        return (*blocks.shape[:2], 32 * blocks.shape[2])

    def read(self, name: str, index: int | None, rows: slice | None) -> np.ndarray:
        """The matrix `index` of a stack, f32, or these rows of it; another tensor as `PlainTensors` reads it."""
        if not name.endswith(_BLOCKS) or name not in self.tensors.files.tensors:
            return self.tensors.read(name, index, rows)
        files = self.tensors.files
        blocks = files.read(name, index, rows)
        scales = exponent_scales(files.read(name.removesuffix(_BLOCKS) + _SCALES, index, rows))
        values = E2M1[np.stack([blocks & 0xF, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], -1)]
        return (values * scales[..., None]).reshape(len(blocks), -1)

    def stored_names(self, names: Collection[str]) -> set[str]:
        """What the files hold of these tensors."""
        scales = {name.removesuffix(_BLOCKS) + _SCALES for name in names if name.endswith(_BLOCKS)}
        return self.tensors.stored_names([*names, *scales])
