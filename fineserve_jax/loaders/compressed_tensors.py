"""Checkpoints of the `compressed-tensors` package (llm-compressor): packed integers, int8 and fp8, and NVFP4.

pack-quantized    weight_packed i32[out, in * bits / 32]   codes, each 2^(bits - 1) more than its value
                  weight_scale [out, groups]
                  weight_zero_point i32[out * bits / 32, groups], packed along its first axis, or i8[out, groups]
                  weight_g_idx i32[in]                     the group of each input; absent: inputs in their order
                  weight_shape i64[2]
int-quantized, float-quantized, naive-quantized    weight i8 or fp8 with weight_scale (see `quantized_scaled.py`)
nvfp4-pack-quantized    weight_packed u8[out, in / 2], lower four bits first; weight_scale fp8[out, in / 16];
                        weight_global_scale f32[1], which divides
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.known_keys import CheckedKeys, check_keys, shown
from fineserve_jax.loaders.matrix_parts import FLOATS, MatrixParts, Method, RowSource, settings_error
from fineserve_jax.loaders.packed_integers import WORD_BITS, unpack_words
from fineserve_jax.loaders.quantized_fp4 import FP4_FORMATS
from fineserve_jax.loaders.quantized_scaled import ACTIVATION_ENDS, FP8, Scaled

_PACKED, _SCALED = "pack-quantized", ("int-quantized", "float-quantized", "naive-quantized")
_STRATEGIES = ("tensor", "channel", "group", "block", "tensor_group")


class CompressedKeys(CheckedKeys):
    """`quantization_config` of quant_method compressed-tensors."""

    format: str = "dense"
    config_groups: dict[str, dict[str, Any]]
    quantization_status: str = "compressed"
    sparsity_config: dict[str, Any] | None = None
    transform_config: dict[str, Any] | None = None


class WeightKeys(CheckedKeys):
    """`weights` of one of config_groups."""

    num_bits: int
    type: str = "int"
    strategy: str | None = None
    group_size: int | None = None
    block_structure: list[int] | str | None = None
    symmetric: bool = True
    dynamic: bool = False


HARMLESS = frozenset(("global_compression_ratio", "ignore", "kv_cache_scheme", "quantization_status", "version"))


@dataclasses.dataclass(frozen=True)
class PackedIntegers:
    """See `Method`. bits: of a value, in any of the checkpoint's groups of layers."""

    bits: tuple[int, ...]
    ends = (
        *("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
        *ACTIVATION_ENDS,
    )

    def applies(self, parts: MatrixParts) -> bool:
        return "weight_packed" in parts and parts.dtype("weight_packed") != "U8"

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        self._bits_of(parts)
        out, inner = (int(size) for size in parts.read("weight_shape"))
        _, groups = parts.sides("weight_scale")
        parts.require("weight_scale", (out, groups), FLOATS)
        if "weight_g_idx" in parts:
            parts.require("weight_g_idx", (inner,), ("I32", "I64"))
        elif inner % groups:
            raise parts.error(f"has {inner} inputs, which do not fall into {groups} groups")
        return out, inner

    def open(self, parts: MatrixParts) -> RowSource:
        (_, inner), bits = self.shape(parts), self._bits_of(parts)
        scales = parts.read_f32("weight_scale")
        zeros = self._zeros(parts, scales.shape, bits)
        groups = scales.shape[1]
        group_of = parts.read("weight_g_idx") if "weight_g_idx" in parts else np.arange(inner) // (inner // groups)
        if not ((group_of >= 0) & (group_of < groups)).all():
            raise parts.error(f"has groups in weight_g_idx beyond its {groups}")
        return PackedMatrix(parts, bits, scales, zeros, group_of)

    def _bits_of(self, parts: MatrixParts) -> int:
        """Bits of a value, which the shapes must allow for one number only of those that the settings name."""
        parts.require("weight_shape", (2,), ("I64", "I32"))
        out, inner = (int(size) for size in parts.read("weight_shape"))
        fits = [bits for bits in self.bits if parts.shape("weight_packed") == (out, -(-inner // (WORD_BITS // bits)))]
        if len(fits) != 1 or parts.dtype("weight_packed") != "I32":
            raise parts.error(
                f"of shape {[out, inner]} has weight_packed of {parts.dtype('weight_packed')}"
                f"{list(parts.shape('weight_packed'))}, which is not {' or '.join(map(str, self.bits))} bits a value"
            )
        return fits[0]

    def _zeros(self, parts: MatrixParts, shape: tuple[int, ...], bits: int) -> np.ndarray | None:
        if "weight_zero_point" not in parts:
            return None
        if parts.dtype("weight_zero_point") == "I8":
            parts.require("weight_zero_point", shape, ("I8",))
            return parts.read_f32("weight_zero_point")
        parts.require("weight_zero_point", (-(-shape[0] // (WORD_BITS // bits)), shape[1]), ("I32",))
        words = np.ascontiguousarray(parts.read("weight_zero_point").T)
        return unpack_words(words, bits)[:, : shape[0]].T.astype(np.float32) - (1 << bits - 1)


@dataclasses.dataclass(frozen=True)
class PackedMatrix:
    """See `RowSource`. zeros: like scales, f32[out, groups]. group_of: the group of each input."""

    parts: MatrixParts
    bits: int
    scales: np.ndarray
    zeros: np.ndarray | None
    group_of: np.ndarray

    def rows(self, rows: slice) -> np.ndarray:
        codes = unpack_words(self.parts.read("weight_packed", rows), self.bits)[:, : len(self.group_of)]
        values = codes.astype(np.float32) - (1 << self.bits - 1)
        if self.zeros is not None:
            values -= self.zeros[rows][:, self.group_of]
        return values * self.scales[rows][:, self.group_of]


@dataclasses.dataclass(frozen=True)
class Mixed:
    """See `Method`. methods: those of the checkpoint's groups of layers; a matrix's tensors say which is its own."""

    methods: tuple[Method, ...]

    @property
    def ends(self) -> tuple[str, ...]:
        return tuple({end for method in self.methods for end in method.ends})

    def applies(self, parts: MatrixParts) -> bool:
        return any(method.applies(parts) for method in self.methods)

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        return self._own(parts).shape(parts)

    def open(self, parts: MatrixParts) -> RowSource:
        return self._own(parts).open(parts)

    def _own(self, parts: MatrixParts) -> Method:
        return next(method for method in self.methods if method.applies(parts))


def compressed_tensors(keys: CompressedKeys) -> Method:
    """The method of these settings; raises ModelLoadError for what is not supported."""
    if (keys.sparsity_config or {}).get("format", "dense") != "dense":
        raise _error(f"sparsity_config has the format {shown((keys.sparsity_config or {})['format'])}")
    if keys.transform_config:
        raise _error("transform_config names rotations")
    if not keys.config_groups:
        raise _error("config_groups is empty")
    groups: dict[str, list[WeightKeys]] = {}
    for name, group in keys.config_groups.items():
        groups.setdefault(group.get("format") or keys.format, []).append(_weights(name, group))
    methods = tuple(_method(form, weights) for form, weights in groups.items())
    return methods[0] if len(methods) == 1 else Mixed(methods)


def _method(form: str, weights: list[WeightKeys]) -> Method:
    if form == _PACKED:
        bits = tuple(sorted({one.num_bits for one in weights}))
        if not {*bits} <= {4, 8}:
            raise _error(f"num_bits is {', '.join(map(str, bits))}, known for {_PACKED} are 4 and 8")
        return PackedIntegers(bits)
    if form in FP4_FORMATS:
        return FP4_FORMATS[form]
    if form in _SCALED:
        return _scaled(form, weights)
    known = ", ".join((_PACKED, *_SCALED, *FP4_FORMATS))
    raise _error(f"format is {shown(form)}, known are {known}")


def _scaled(form: str, weights: list[WeightKeys]) -> Scaled:
    blocks = {tuple(one.block_structure) for one in weights if isinstance(one.block_structure, list)}
    if len(blocks) > 1 or any((one.strategy == "block") != bool(blocks) for one in weights):
        raise _error("config_groups have blocks of different sizes")
    if any(one.num_bits != 8 for one in weights):
        raise _error(f"num_bits of {form} is not 8")
    block = blocks.pop() if blocks else None
    if block is not None and (len(block) != 2 or min(block) < 1):
        raise _error(f"block_structure is {list(block)}")
    return Scaled(None if block is None else (block[0], block[1]), ("I8", *FP8))


def _weights(name: str, group: dict[str, Any]) -> WeightKeys:
    stated = group.get("weights")
    if not isinstance(stated, dict):
        raise _error(f"{name} quantises no weights")
    keys = check_keys(WeightKeys, stated, f"config.json: quantization_config.config_groups.{name}.weights.")
    if keys.strategy not in (None, *_STRATEGIES) or keys.type not in ("int", "float") or keys.dynamic:
        raise _error(f"{name} has weights of type {shown(keys.type)} and strategy {shown(keys.strategy)}")
    return keys


def _error(problem: str) -> ModelLoadError:
    return settings_error("compressed-tensors", problem)
