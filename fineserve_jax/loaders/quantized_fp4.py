"""Matrices of 4-bit floats with a scale for each group of a row, as the `compressed-tensors` package packs them.

weight_packed u8[out, in / 2]    two values of neighbouring inputs, the lower four bits first (e2m1)
nvfp4    weight_scale fp8[out, in / 16], divided by weight_global_scale f32[1]
mxfp4    weight_scale u8[out, in / 32], exponents of two, 127 more than they are (OCP Microscaling formats)
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fineserve_jax.loaders.matrix_parts import MatrixParts, RowSource
from fineserve_jax.loaders.quantized_scaled import ACTIVATION_ENDS, FP8, spread

# Sign, two bits of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
_EXPONENT_BIAS = 127


@dataclasses.dataclass(frozen=True)
class FP4:
    """See `Method`.

    group: inputs that share a scale.
    overall: whether a scale of the whole matrix divides those of the groups; else these are exponents.
    """

    group: int
    overall: bool
    ends = ("weight_packed", "weight_scale", "weight_global_scale", *ACTIVATION_ENDS)

    def applies(self, parts: MatrixParts) -> bool:
        return "weight_packed" in parts and parts.dtype("weight_packed") == "U8"

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        out, half = parts.sides("weight_packed")
        parts.require("weight_packed", (out, half), ("U8",))
        parts.require("weight_scale", (out, 2 * half // self.group), FP8 if self.overall else ("U8", "F8_E8M0"))
        if self.overall:
            parts.require("weight_global_scale", (1,), ("F32",))
        return out, 2 * half

    def open(self, parts: MatrixParts) -> RowSource:
        self.shape(parts)
        if self.overall:
            return FP4Matrix(parts, parts.read_f32("weight_scale") / parts.read_f32("weight_global_scale"))
        return FP4Matrix(parts, exponent_scales(parts.read("weight_scale")))


@dataclasses.dataclass(frozen=True)
class FP4Matrix:
    """See `RowSource`."""

    parts: MatrixParts
    scales: np.ndarray

    def rows(self, rows: slice) -> np.ndarray:
        packed = self.parts.read("weight_packed", rows)
        values = E2M1[np.stack([packed & 0xF, packed >> 4], axis=-1).reshape(len(packed), -1)]
        return values * spread(self.scales, rows, values.shape[1], None)


FP4_FORMATS = {"nvfp4-pack-quantized": FP4(16, overall=True), "mxfp4-pack-quantized": FP4(32, overall=False)}
"""By their names in `compressed-tensors`."""


def exponent_scales(stored: np.ndarray) -> np.ndarray:
    """Powers of two, f32, from exponents stored as u8 or e8m0."""
    return np.ldexp(np.float32(1), stored.view(np.uint8).astype(np.int32) - _EXPONENT_BIAS)
