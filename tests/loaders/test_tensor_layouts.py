"""Checkpoints whose tensors are named and joined in other ways than the usual ones of their family."""

import json
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from gguf_files import add_tensor, converted, write_gguf
from model_oracle import FIXTURES, case_config, case_tensors
from safetensors.numpy import save_file

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_model import GGUFModel
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import pack_params
from fineserve_jax.models.params import tensor_names, tensor_shape

EXPERT = re.compile(r"(.*\.mlp\.experts)\.\d+\.(gate|up|down)_proj\.weight")


def _assert_same(source, case):
    """Every tensor of the model is the fixture's, and none is left."""
    names = tensor_names(source.config)
    usual = HFModel(FIXTURES / case)
    for name in names:
        assert source.shape(name) == tensor_shape(source.config, name)
        np.testing.assert_array_equal(source.read(name), usual.read(name), err_msg=name)
    assert source.unused(names) == []


def _written(tmp_path, case, tensors, **config):
    target = Path(tempfile.mkdtemp(dir=tmp_path))
    (target / "config.json").write_text(json.dumps({**case_config(case), **config}))
    save_file({name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}, target / "model.safetensors")
    return HFModel(target)


def _stacked(case):
    """The experts' tensors as transformers keeps them since version 5: gates above what they gate, experts stacked."""
    found, parts = {}, {}
    names = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    for name, tensor in case_tensors(case).items():
        name = name.replace("block_sparse_moe", "mlp")
        name = re.sub(r"\.(w[123])\.weight", lambda match: f".{names[match[1]]}.weight", name)
        if match := EXPERT.fullmatch(name):
            parts.setdefault(match[1], {}).setdefault(match[2], []).append(tensor)
        else:
            found[name] = tensor
    for prefix, by_part in parts.items():
        gate, up, down = (np.stack(by_part[part]) for part in ("gate", "up", "down"))
        found |= {f"{prefix}.gate_up_proj": np.concatenate([gate, up], axis=1), f"{prefix}.down_proj": down}
    return found


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_experts_may_be_stacked(tmp_path, case):
    _assert_same(_written(tmp_path, case, _stacked(case)), case)


def _in_mxfp4(matrices, rng):
    """Stacks [experts, in, out] as random MXFP4 blocks and scales, and what these stand for, in the same layout."""
    experts, inner, out = matrices.shape
    blocks = rng.integers(0, 256, (experts, out, inner // 32, 16), np.uint8)
    scales = rng.integers(120, 126, (experts, out, inner // 32), np.uint8)
    magnitude = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    codes = np.empty((experts, out, inner // 32, 32), np.uint8)
    codes[..., 0::2], codes[..., 1::2] = blocks % 16, blocks // 16
    values = np.where(codes < 8, 1.0, -1.0) * magnitude[codes % 8] * 2.0 ** (scales[..., None].astype(float) - 127)
    return blocks, scales, values.reshape(experts, out, inner).swapaxes(1, 2).astype(np.float32)


def test_mxfp4_experts_are_what_their_blocks_and_scales_stand_for(tmp_path):
    """gpt-oss has the rows of gates and of what they gate in turns."""
    rng, quantized, plain = np.random.default_rng(0), {}, {}
    for name, tensor in case_tensors("gpt_oss").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            blocks, scales, plain[name] = _in_mxfp4(tensor, rng)
            quantized |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            quantized[name] = plain[name] = tensor
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    source = _written(tmp_path, "gpt_oss", quantized, quantization_config=settings)
    usual = _written(tmp_path, "gpt_oss", plain)
    for name in tensor_names(usual.config):
        np.testing.assert_array_equal(source.read(name), usual.read(name), err_msg=name)
    part = "model.layers.1.mlp.experts.2.up_proj.weight"
    np.testing.assert_array_equal(source.read(part, slice(3, 70)), usual.read(part)[3:70])
    assert source.unused(tensor_names(usual.config)) == []
    del quantized["model.layers.0.mlp.experts.down_proj_scales"]
    damaged = _written(tmp_path, "gpt_oss", quantized, quantization_config=settings)
    with pytest.raises(ModelLoadError, match=r"down_proj_blocks is U8\[3, 64, 4, 16\], and its scales are none"):
        damaged.shape("model.layers.0.mlp.experts.0.down_proj.weight")


def test_a_stack_of_another_number_of_experts_is_refused(tmp_path):
    source = _written(tmp_path, "qwen3_moe", _stacked("qwen3_moe"), num_experts=2, num_local_experts=2)
    with pytest.raises(ModelLoadError, match=r"gate_up_proj has shape \[3, 256, 64\].*implies \[2, 256, 64\]"):
        pack_params(source.config, "fp32", source)


def test_experts_beyond_the_configured_number_are_refused(tmp_path):
    source = _written(tmp_path, "mixtral", case_tensors("mixtral"), num_local_experts=3)
    with pytest.raises(ModelLoadError, match=r"gate\.weight has shape \[4, 64\].*implies \[3, 64\]"):
        pack_params(source.config, "fp32", source)
    tensors = {n: t[:3] if n.endswith("moe.gate.weight") else t for n, t in case_tensors("mixtral").items()}
    source = _written(tmp_path, "mixtral", tensors, num_local_experts=3)
    with pytest.raises(ModelLoadError, match=r"6 tensors that nothing here uses.*experts\.3\.w1"):
        pack_params(source.config, "fp32", source)


def test_fused_projections_may_be_apart(tmp_path):
    tensors = {}
    for name, tensor in case_tensors("phi3").items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", np.split(tensor, (64, 96)), strict=True):
                tensors[name.replace("qkv", part)] = rows
        else:
            tensors[name] = tensor
    _assert_same(_written(tmp_path, "phi3", tensors), "phi3")


def test_a_fused_projection_with_rows_too_many_is_refused(tmp_path):
    tensors = case_tensors("phi3")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    tensors[name] = np.concatenate([tensors[name], tensors[name][:2]])
    source = _written(tmp_path, "phi3", tensors)
    with pytest.raises(ModelLoadError, match=r"qkv_proj\.weight has shape \[130, 64\].*implies \[128, 64\]"):
        pack_params(source.config, "fp32", source)


def test_gguf_files_of_before_stacks_of_experts_are_read(tmp_path):
    stacks = {name: tensor for name, tensor in converted("mixtral").items() if "_exps" in name}

    def add(writer):
        for name, tensor in stacks.items():
            for expert, matrix in enumerate(tensor):
                add_tensor(writer, name.replace("_exps", f".{expert}"), matrix.astype(np.float32))

    path = write_gguf(tmp_path / "m.gguf", "mixtral", leave_out=tuple(stacks), more=add)
    _assert_same(GGUFModel(GGUFFile(path)), "mixtral")
