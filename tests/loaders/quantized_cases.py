"""Quantised checkpoints, packed bit by bit as each format's description says, beside what they stand for.

A case makes of a shape `[out, in]`: the tensors of a matrix by the ends of their names, and the matrix, float64 in the
formula's own terms.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from model_oracle import FIXTURES, case_tensors
from safetensors.numpy import save_file

Tensors = dict[str, np.ndarray]
FP8 = ml_dtypes.float8_e4m3fn
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # which output of eight lies in each four bits of a word, from the lowest


class Case(NamedTuple):
    """A format: `quantization_config`, and what makes a matrix of a generator and a shape."""

    settings: dict[str, Any]
    matrix: Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]


def _words(values: np.ndarray, bits: int) -> np.ndarray:
    """u[n, k] -> i32[n, k * bits / 32]: the rows' values as one run of bits each, lowest first."""
    runs = [sum(int(value) << at * bits for at, value in enumerate(row)) for row in values]
    count = -(-values.shape[1] * bits // 32)
    words = [[run >> 32 * at & 0xFFFFFFFF for at in range(count)] for run in runs]
    return np.array(words, np.uint64).astype(np.uint32).view(np.int32)


def _scales(rng, *shape):
    return (0.002 + 0.01 * rng.random(shape)).astype(np.float16)


def awq(group):
    def matrix(rng, out, inner):
        groups = 1 if group == -1 else inner // group
        codes, zeros = rng.integers(0, 16, (inner, out)), rng.integers(0, 16, (groups, out))
        scales = _scales(rng, groups, out)
        order = np.arange(out).reshape(-1, 8)[:, AWQ_ORDER].ravel()
        tensors = {"qweight": _words(codes[:, order], 4), "qzeros": _words(zeros[:, order], 4), "scales": scales}
        value = np.empty((out, inner))
        for i in range(inner):
            g = i // (inner // groups)
            value[:, i] = (codes[i] - zeros[g]) * scales[g].astype(np.float64)
        return tensors, value

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return Case({**settings, "modules_to_not_convert": None}, matrix)


def gptq(bits, group, form="gptq", act_order=False, symmetric=False, with_index=True):
    def matrix(rng, out, inner):
        groups = 1 if group == -1 else -(-inner // group)
        codes = rng.integers(0, 1 << bits, (inner, out))
        zeros = np.full((groups, out), 1 << bits - 1) if symmetric else rng.integers(1, 1 << bits, (groups, out))
        scales = _scales(rng, groups, out)
        group_of = np.arange(inner) // (inner if group == -1 else group)
        group_of = rng.permutation(group_of) if act_order else group_of
        stored = zeros - 1 if form == "gptq" else zeros
        tensors = {"qweight": _words(codes.T, bits).T.copy(), "qzeros": _words(stored, bits), "scales": scales}
        if with_index:
            tensors["g_idx"] = group_of.astype(np.int32)
        value = np.empty((out, inner))
        for i in range(inner):
            g = group_of[i]
            value[:, i] = (codes[i] - zeros[g]) * scales[g].astype(np.float64)
        return tensors, value

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order, "sym": symmetric}
    return Case({**settings, "checkpoint_format": form, "damp_percent": 0.1, "true_sequential": True}, matrix)


def _fp8(rng, out, inner):
    return (4 * rng.standard_normal((out, inner))).astype(FP8)


def fp8_blocks(rows, columns, scale_type=np.float32):
    def matrix(rng, out, inner):
        weight = _fp8(rng, out, inner)
        scale = _scales(rng, -(-out // rows), -(-inner // columns)).astype(scale_type)
        value = weight.astype(np.float64)
        for i in range(out):
            for j in range(inner):
                value[i, j] *= float(scale[i // rows, j // columns])
        return {"weight": weight, "weight_scale_inv": scale}, value

    settings = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
    return Case({**settings, "weight_block_size": [rows, columns]}, matrix)


def fp8_whole():
    def matrix(rng, out, inner):
        weight, scale = _fp8(rng, out, inner), _scales(rng, 1).astype(np.float32).reshape(())
        tensors = {"weight": weight, "weight_scale": scale, "input_scale": np.float32(0.5).reshape(())}
        return tensors, weight.astype(np.float64) * float(scale)

    return Case({"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}, matrix)


def _compressed(form, weights, **more):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    settings = {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}
    return {**settings, "ignore": ["lm_head"], "quantization_status": "compressed", "kv_cache_scheme": None, **more}


def packed(bits, group, symmetric=True, act_order=False, zeros_as_bytes=False):
    def matrix(rng, out, inner):
        groups = 1 if group == -1 else inner // group
        half, per_word = 1 << bits - 1, 32 // bits
        values = rng.integers(-half, half, (out, inner))
        scales = _scales(rng, out, groups)
        zeros = rng.integers(-half, half, (out, groups)) * (not symmetric)
        group_of = np.arange(inner) // (inner // groups)
        group_of = rng.permutation(group_of) if act_order else group_of
        tensors = {
            "weight_packed": _words(values + half, bits),
            "weight_scale": scales.astype(ml_dtypes.bfloat16),
            "weight_shape": np.array([out, inner], np.int64),
        }
        if act_order:
            tensors["weight_g_idx"] = group_of.astype(np.int32)
        if not symmetric:
            filled = np.zeros((-(-out // per_word) * per_word, groups), np.int64)
            filled[:out] = zeros + half
            tensors["weight_zero_point"] = zeros.astype(np.int8) if zeros_as_bytes else _words(filled.T, bits).T.copy()
        value = np.empty((out, inner))
        for i in range(inner):
            g = group_of[i]
            value[:, i] = (values[:, i] - zeros[:, g]) * tensors["weight_scale"][:, g].astype(np.float64)
        return tensors, value

    strategy = "channel" if group == -1 else "group"
    weights = {"num_bits": bits, "type": "int", "strategy": strategy, "symmetric": symmetric, "dynamic": False}
    weights |= {"group_size": None if group == -1 else group, "actorder": "group" if act_order else None}
    return Case(_compressed("pack-quantized", weights), matrix)


def scaled(form, per, block=None, zeros=False):
    """per: what has a scale of its own: tensor, channel, group (of 16) or block."""

    def matrix(rng, out, inner):
        is_int = form == "int-quantized"
        weight = rng.integers(-128, 128, (out, inner)).astype(np.int8) if is_int else _fp8(rng, out, inner)
        rows, columns = {"tensor": (out, inner), "channel": (1, inner), "group": (1, 16), "block": block}[per]
        scale = _scales(rng, -(-out // rows), -(-inner // columns)).astype(ml_dtypes.bfloat16)
        scale = scale.reshape(1) if per == "tensor" else scale
        zero = rng.integers(-9, 9, scale.shape).astype(np.int8) if zeros else np.zeros(scale.shape, np.int8)
        value = np.empty((out, inner))
        for i in range(out):
            for j in range(inner):
                at = (0,) if per == "tensor" else (i // rows, j // columns)
                value[i, j] = (float(weight[i, j]) - float(zero[at])) * float(scale[at])
        tensors = {"weight": weight, "weight_scale": scale}
        return {**tensors, **({"weight_zero_point": zero} if zeros else {})}, value

    weights = {"num_bits": 8, "type": "int" if form == "int-quantized" else "float", "strategy": per}
    weights |= {"symmetric": not zeros, "dynamic": False, "block_structure": None if block is None else list(block)}
    return Case(_compressed(form, weights), matrix)


def _e2m1(code):
    """Sign, two bits of exponent, one of mantissa; the lowest exponent is that of numbers without a leading one."""
    exponent, mantissa = code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
    return -size if code & 8 else size


def nvfp4():
    def matrix(rng, out, inner):
        codes = rng.integers(0, 16, (out, inner))
        scale = (1 + 20 * rng.random((out, inner // 16))).astype(FP8)
        overall = np.array([700.0], np.float32)
        pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        value = np.empty((out, inner))
        for i in range(out):
            for j in range(inner):
                value[i, j] = _e2m1(codes[i, j]) * float(scale[i, j // 16]) / float(overall[0])
        return {"weight_packed": pairs, "weight_scale": scale, "weight_global_scale": overall}, value

    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    return Case(_compressed("nvfp4-pack-quantized", weights), matrix)


def mxfp4():
    def matrix(rng, out, inner):
        codes, exponents = rng.integers(0, 16, (out, inner)), rng.integers(118, 125, (out, inner // 32))
        pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
        value = np.empty((out, inner))
        for i in range(out):
            for j in range(inner):
                value[i, j] = _e2m1(codes[i, j]) * 2.0 ** (exponents[i, j // 32] - 127)
        return {"weight_packed": pairs, "weight_scale": exponents.astype(np.uint8)}, value

    weights = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32, "symmetric": True}
    return Case(_compressed("mxfp4-pack-quantized", weights), matrix)


def mixed():
    """Each matrix in one of two formats."""
    first, second = packed(4, 32), scaled("float-quantized", "channel")

    def matrix(rng, out, inner):
        return (first if rng.random() < 0.5 else second).matrix(rng, out, inner)

    groups = {}
    for name, case in (("a", first), ("b", second)):
        groups[name] = {**case.settings["config_groups"]["group_0"], "format": case.settings["format"]}
    return Case({**first.settings, "format": "mixed-precision", "config_groups": groups}, matrix)


CASES = {
    "awq": awq(32),
    "awq, one group": awq(-1),
    "gptq": gptq(4, 32),
    "gptq, two bits": gptq(2, 32),
    "gptq, three bits": gptq(3, 32),
    "gptq, eight bits, symmetric": gptq(8, 32, symmetric=True),
    "gptq, symmetric, one group": gptq(4, -1, symmetric=True),
    "gptq, activation order": gptq(4, 32, act_order=True),
    "gptq, without an index": gptq(4, 32, with_index=False),
    "gptq, second format": gptq(4, 32, form="gptq_v2", act_order=True),
    "fp8, blocks": fp8_blocks(32, 32),
    "fp8, blocks that are cut off": fp8_blocks(48, 40),
    "fp8, blocks, powers of two": fp8_blocks(32, 32, ml_dtypes.float8_e8m0fnu),
    "fp8, one scale": fp8_whole(),
    "packed int4": packed(4, 32),
    "packed int4, rows": packed(4, -1),
    "packed int4, zero points": packed(4, 16, symmetric=False),
    "packed int4, zero points in bytes": packed(4, 16, symmetric=False, zeros_as_bytes=True),
    "packed int4, activation order": packed(4, 16, act_order=True),
    "packed int8": packed(8, 32, symmetric=False),
    "int8, rows": scaled("int-quantized", "channel"),
    "int8, one scale": scaled("int-quantized", "tensor"),
    "int8, groups, zero points": scaled("int-quantized", "group", zeros=True),
    "float8, rows": scaled("float-quantized", "channel"),
    "float8, one scale": scaled("float-quantized", "tensor"),
    "float8, blocks": scaled("float-quantized", "block", block=(24, 40)),
    "naive, rows": scaled("naive-quantized", "channel"),
    "nvfp4": nvfp4(),
    "mxfp4": mxfp4(),
    "several formats": mixed(),
}


def write_checkpoint(
    folder: Path, case: Case, edit: Callable[[Tensors], None] = lambda stored: None, **settings: Any
) -> tuple[Path, Tensors]:
    """A fixture's checkpoint with all projections quantised, and its tensors with what they stand for.

    edit: changes the tensors that are stored. settings: of `quantization_config`, instead of the case's.
    """
    shutil.copytree(FIXTURES / "llama", folder)
    rng, stored, plain = np.random.default_rng(0), Tensors(), Tensors()
    for name, tensor in case_tensors("llama").items():
        if not name.endswith("_proj.weight"):
            stored[name] = plain[name] = tensor
            continue
        tensors, plain[name] = case.matrix(rng, *tensor.shape)
        stored |= {f"{name.removesuffix('weight')}{end}": np.ascontiguousarray(part) for end, part in tensors.items()}
    edit(stored)
    save_file(stored, folder / "model.safetensors")
    change_config(folder, quantization_config={**case.settings, **settings})
    return folder, plain


def change_config(folder: Path, **changes: Any) -> None:
    """Sets keys of config.json."""
    stated = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**stated, **changes}))
