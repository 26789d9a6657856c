"""Matrices of small numbers, fp8 or int8, that scales multiply: of the whole matrix, of rows, groups or blocks."""

from __future__ import annotations

import dataclasses

import numpy as np

from fineserve_jax.loaders.known_keys import CheckedKeys
from fineserve_jax.loaders.matrix_parts import FLOATS, MatrixParts, settings_error

FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = ("weight_scale_inv", "weight_scale")
_SCALE_TYPES = (*FLOATS, "F64", "F8_E8M0")
ACTIVATION_ENDS = ("input_scale", "input_zero_point", "output_scale", "output_zero_point", "input_global_scale")
"""Of activations, which are computed in full precision here."""


class FP8Keys(CheckedKeys):
    """`quantization_config` of quant_method fp8."""

    weight_block_size: list[int] | None = None
    activation_scheme: str | None = None
    fmt: str = "e4m3"
    scale_fmt: str | None = None


HARMLESS = frozenset(("activation_scheme", "ignored_layers", "kv_cache_scheme", "modules_to_not_convert", "scale_fmt"))


@dataclasses.dataclass(frozen=True)
class Scaled:
    """See `Method`.

    block: rows and columns that share a scale; None: as the scales' shape says, one, or one for each row or group.
    types: what the numbers are stored as.
    """

    block: tuple[int, int] | None = None
    types: tuple[str, ...] = FP8
    ends = ("weight", *_SCALES, "weight_zero_point", *ACTIVATION_ENDS)

    def applies(self, parts: MatrixParts) -> bool:
        return "weight" in parts and parts.dtype("weight") in self.types

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        out, inner = parts.sides("weight")
        stated = [end for end in _SCALES if end in parts]
        if len(stated) != 1:
            raise parts.error(f"has {len(stated)} of weight_scale_inv and weight_scale, must have one")
        scale = parts.shape(stated[0])
        if self.block is not None:
            parts.require(stated[0], (-(-out // self.block[0]), -(-inner // self.block[1])), _SCALE_TYPES)
        elif scale not in ((), (1,), (1, 1), (out,), (out, 1)) and not (
            len(scale) == 2 and scale[0] == out and scale[1] and inner % scale[1] == 0
        ):
            raise parts.error(f"of shape {[out, inner]} has {stated[0]} of shape {list(scale)}")
        if "weight_zero_point" in parts:
            parts.require("weight_zero_point", scale, ("I8", *self.types))
        return out, inner

    def open(self, parts: MatrixParts) -> ScaledMatrix:
        self.shape(parts)
        scale = next(parts.read_f32(end) for end in _SCALES if end in parts)
        zero = parts.read_f32("weight_zero_point") if "weight_zero_point" in parts else None
        return ScaledMatrix(parts, self.block, scale, zero)


@dataclasses.dataclass(frozen=True)
class ScaledMatrix:
    """See `RowSource`."""

    parts: MatrixParts
    block: tuple[int, int] | None
    scale: np.ndarray
    zero: np.ndarray | None

    def rows(self, rows: slice) -> np.ndarray:
        values = self.parts.read_f32("weight", rows)
        if self.zero is not None:
            values -= spread(self.zero, rows, values.shape[1], self.block)
        values *= spread(self.scale, rows, values.shape[1], self.block)
        return values


def spread(scale: np.ndarray, rows: slice, inner: int, block: tuple[int, int] | None) -> np.ndarray:
    """What multiplies these rows of a matrix of `inner` columns; of a shape that numpy can stretch to theirs."""
    if scale.size == 1:
        return scale.reshape(1, 1)
    if block is not None:
        row_blocks = np.arange(rows.start, rows.stop) // block[0]
        return np.repeat(scale[row_blocks], block[1], axis=1)[:, :inner]
    of_rows = scale.reshape(len(scale), -1)[rows]
    return np.repeat(of_rows, inner // of_rows.shape[1], axis=1) if of_rows.shape[1] > 1 else of_rows


def fp8(keys: FP8Keys) -> Scaled:
    """The method of these settings; raises ModelLoadError for what is not supported."""
    if keys.fmt.lower() not in ("e4m3", "float8_e4m3fn", "e5m2"):
        raise settings_error("fp8", f"fmt is {keys.fmt!a}, known are e4m3 and e5m2")
    size = keys.weight_block_size
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise settings_error("fp8", f"weight_block_size is {size}")
    return Scaled(None if size is None else (size[0], size[1]))
