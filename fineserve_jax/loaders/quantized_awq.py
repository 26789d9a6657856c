"""AWQ checkpoints as AutoAWQ's `gemm` version packs them (arXiv 2306.00978).

qweight i32[in, out / 8]            eight values of neighbouring outputs, 4 bits each, in the order below
qzeros  i32[in / group, out / 8]    zero points, likewise
scales  f16[in / group, out]        value = (code - zero) * scale
"""

from __future__ import annotations

import dataclasses

import numpy as np

from fineserve_jax.loaders.known_keys import CheckedKeys
from fineserve_jax.loaders.matrix_parts import FLOATS, MatrixParts, settings_error
from fineserve_jax.loaders.packed_integers import unpack_words

_BITS, _PER_WORD = 4, 8
# For each output of a word, the place at which its four bits lie.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class AWQKeys(CheckedKeys):
    """`quantization_config` of quant_method awq."""

    bits: int = 4
    w_bit: int | None = None
    group_size: int = 128
    q_group_size: int | None = None
    zero_point: bool = True
    version: str = "gemm"


HARMLESS = frozenset(("backend", "do_fuse", "exllama_config", "fuse_max_seq_len", "modules_to_fuse"))


@dataclasses.dataclass(frozen=True)
class AWQ:
    """See `Method`. group_size: inputs that share a scale and a zero point; -1: all."""

    group_size: int
    ends = ("qweight", "qzeros", "scales")

    def applies(self, parts: MatrixParts) -> bool:
        return "qweight" in parts

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        inner, words = parts.sides("qweight")
        group = inner if self.group_size == -1 else self.group_size
        if inner % group:
            raise parts.error(f"has {inner} inputs, which are no multiple of the groups of {group}")
        groups = inner // group
        parts.require("qweight", (inner, words), ("I32",))
        parts.require("qzeros", (groups, words), ("I32",))
        parts.require("scales", (groups, words * _PER_WORD), FLOATS)
        return words * _PER_WORD, inner

    def open(self, parts: MatrixParts) -> AWQMatrix:
        return AWQMatrix(parts.read("qweight"), parts.read("qzeros"), parts.read("scales"))


@dataclasses.dataclass(frozen=True)
class AWQMatrix:
    """See `RowSource`."""

    qweight: np.ndarray
    qzeros: np.ndarray
    scales: np.ndarray

    def rows(self, rows: slice) -> np.ndarray:
        words = slice(rows.start // _PER_WORD, -(-rows.stop // _PER_WORD))
        inside = slice(rows.start - words.start * _PER_WORD, rows.stop - words.start * _PER_WORD)
        codes, zeros = (
            unpack_words(np.ascontiguousarray(packed[:, words]), _BITS, _PLACES)[:, inside].astype(np.float32)
            for packed in (self.qweight, self.qzeros)
        )
        groups, scales = len(zeros), self.scales[:, rows].astype(np.float32)
        values = (codes.reshape(groups, -1, codes.shape[1]) - zeros[:, None]) * scales[:, None]
        return np.ascontiguousarray(values.reshape(codes.shape).T)


def awq(keys: AWQKeys) -> AWQ:
    """The method of these settings; raises ModelLoadError for what is not supported."""
    bits = keys.bits if keys.w_bit is None else keys.w_bit
    if bits != _BITS:
        raise settings_error("awq", f"bits is {bits}, only {_BITS} is known")
    if keys.version.lower() != "gemm":
        raise settings_error("awq", f"version is {keys.version!a}, only gemm is known")
    if not keys.zero_point:
        raise settings_error("awq", "zero_point is false")
    group = keys.group_size if keys.q_group_size is None else keys.q_group_size
    if group != -1 and group < 1:
        raise settings_error("awq", f"group_size is {group}")
    return AWQ(group)
