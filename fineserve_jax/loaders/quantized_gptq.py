"""GPTQ checkpoints as AutoGPTQ and GPTQModel pack them (arXiv 2210.17323).

qweight i32[in * bits / 32, out]        each output's codes, one after the other
qzeros  i32[groups, out * bits / 32]    zero points; in the older format (`gptq`) less one
scales  f16[groups, out]                value = (code - zero) * scale
g_idx   i32[in]                         the group of each input; absent: inputs in their order
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from fineserve_jax.loaders.known_keys import CheckedKeys
from fineserve_jax.loaders.matrix_parts import FLOATS, MatrixParts, settings_error
from fineserve_jax.loaders.packed_integers import WORD_BITS, unpack_stream

_BITS = (2, 3, 4, 8)


class GPTQKeys(CheckedKeys):
    """`quantization_config` of quant_method gptq."""

    bits: int | None = None
    group_size: int = 128
    checkpoint_format: str | None = None
    format: str | None = None
    is_marlin_format: bool = False
    pack_dtype: str = "int32"
    dynamic: dict[str, Any] | None = None


HARMLESS = frozenset(
    (
        *("backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "cache_examples_on_gpu"),
        *("damp_auto_increment", "damp_percent", "dataset", "desc_act", "exllama_config", "lm_head"),
        *("max_input_length", "meta", "model_file_base_name", "model_name_or_path", "model_seqlen"),
        *("module_name_preceding_first_block", "modules_in_block_to_quantize", "mse", "offload_to_disk"),
        *("pad_token_id", "quantizer", "static_groups", "sym", "tokenizer", "true_sequential", "use_cuda_fp16"),
        *("use_exllama", "v2"),
    )
)


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """See `Method`.

    group_size: inputs that share a scale and a zero point; -1: all.
    zero_offset: what is added to a stored zero point.
    """

    bits: int
    group_size: int
    zero_offset: int
    ends = ("qweight", "qzeros", "scales", "g_idx")

    def applies(self, parts: MatrixParts) -> bool:
        return "qweight" in parts

    def shape(self, parts: MatrixParts) -> tuple[int, int]:
        words, out = parts.sides("qweight")
        inner = words * WORD_BITS // self.bits
        groups = 1 if self.group_size == -1 else -(-inner // self.group_size)
        parts.require("qweight", (words, out), ("I32",))
        parts.require("qzeros", (groups, out * self.bits // WORD_BITS), ("I32",))
        parts.require("scales", (groups, out), FLOATS)
        if "g_idx" in parts:
            parts.require("g_idx", (inner,), ("I32",))
        return out, inner

    def open(self, parts: MatrixParts) -> GPTQMatrix:
        _, inner = self.shape(parts)
        groups = parts.shape("scales")[0]
        if "g_idx" in parts:
            group_of = parts.read("g_idx")
            if not ((group_of >= 0) & (group_of < groups)).all():
                raise parts.error(f"has groups in g_idx beyond its {groups}")
        else:
            group_of = np.arange(inner) // (inner if self.group_size == -1 else self.group_size)
        zeros = unpack_stream(np.ascontiguousarray(parts.read("qzeros").T), self.bits).T
        zeros = zeros + np.uint8(self.zero_offset) & np.uint8((1 << self.bits) - 1)
        return GPTQMatrix(self.bits, parts.read("qweight"), zeros, parts.read("scales"), group_of)


@dataclasses.dataclass(frozen=True)
class GPTQMatrix:
    """See `RowSource`. zeros: u8[groups, out]."""

    bits: int
    qweight: np.ndarray
    zeros: np.ndarray
    scales: np.ndarray
    group_of: np.ndarray

    def rows(self, rows: slice) -> np.ndarray:
        codes = unpack_stream(self.qweight[:, rows], self.bits)
        zeros, scales = (array[:, rows].astype(np.float32)[self.group_of] for array in (self.zeros, self.scales))
        return np.ascontiguousarray(((codes - zeros) * scales).T)


def gptq(keys: GPTQKeys) -> GPTQ:
    """The method of these settings; raises ModelLoadError for what is not supported."""
    stated = keys.checkpoint_format or keys.format or "gptq"
    if keys.bits is None or keys.bits not in _BITS:
        raise settings_error("gptq", f"bits is {keys.bits}, known are {', '.join(map(str, _BITS))}")
    if stated not in ("gptq", "gptq_v2") or keys.is_marlin_format:
        stated = "marlin" if keys.is_marlin_format else stated
        raise settings_error("gptq", f"checkpoint_format is {stated!a}, known are gptq and gptq_v2")
    if keys.pack_dtype not in ("int32", "torch.int32"):
        raise settings_error("gptq", f"pack_dtype is {keys.pack_dtype!a}, only int32 is known")
    if keys.dynamic:
        raise settings_error("gptq", "dynamic gives some layers settings of their own")
    if keys.group_size != -1 and keys.group_size < 1:
        raise settings_error("gptq", f"group_size is {keys.group_size}")
    return GPTQ(keys.bits, keys.group_size, 1 if stated == "gptq" else 0)
