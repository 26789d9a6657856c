"""Quantised Hugging Face checkpoints load as what they stand for; forms that are not understood are refused by name."""

import json

import jax
import numpy as np
import pytest
from gguf_files import write_gguf
from model_oracle import case_tensors
from quantized_cases import CASES, change_config, write_checkpoint
from safetensors.numpy import save_file

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import convert, load_model
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.loaders.hf_tokenizer import save_tokenizer
from fineserve_jax.models import pack_params

NAMES = [name for name in case_tensors("llama") if name.endswith("_proj.weight")]


@pytest.mark.parametrize("name", CASES)
def test_each_matrix_is_what_its_codes_and_scales_stand_for(tmp_path, name):
    folder, plain = write_checkpoint(tmp_path / "m", CASES[name])
    model = HFModel(folder)
    for matrix in NAMES:
        expected = plain[matrix].astype(np.float32)
        assert model.shape(matrix) == expected.shape
        np.testing.assert_allclose(model.read(matrix), expected, rtol=2e-6, atol=0)
        for rows in (slice(0, 5), slice(5, 13), slice(13, len(expected))):
            np.testing.assert_allclose(model.read(matrix, rows), expected[rows], rtol=2e-6, atol=0)
    assert not model.unused(plain)


@pytest.mark.parametrize("name", ["awq", "gptq, activation order", "fp8, blocks", "packed int4", "int8, rows"])
def test_a_quantised_checkpoint_loads_and_converts_like_its_plain_one(tmp_path, name):
    folder, plain = write_checkpoint(tmp_path / "m", CASES[name])
    same, _ = write_checkpoint(tmp_path / "plain", CASES[name])
    save_file({key: np.asarray(value, np.float32) for key, value in plain.items()}, same / "model.safetensors")
    config = json.loads((same / "config.json").read_text())
    del config["quantization_config"]
    (same / "config.json").write_text(json.dumps(config))
    for target in (folder, same):
        save_tokenizer(gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "t.gguf", "smollm2"))), target)
    found, expected = (load_model(path, "int8").params for path in (folder, same))
    for mine, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # A value on the edge of two codes may fall to either side.
        np.testing.assert_allclose(np.float32(mine), np.float32(other), rtol=1e-5, atol=1.0 * (mine.dtype == np.int8))
    convert(folder, tmp_path / "converted", "int8")
    again = load_model(tmp_path / "converted", "int8").params
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), found, again))


def test_layers_that_are_left_out_of_quantisation_are_read_as_they_are(tmp_path):
    original = case_tensors("llama")

    def edit(stored):
        for name in [key for key in stored if "self_attn" in key]:
            del stored[name]
        stored |= {key: value for key, value in original.items() if "self_attn" in key}

    folder, _ = write_checkpoint(tmp_path / "m", CASES["awq"], edit, modules_to_not_convert=["self_attn"])
    model = HFModel(folder)
    name = "model.layers.1.self_attn.k_proj.weight"
    np.testing.assert_array_equal(model.read(name), original[name].astype(np.float32))
    assert not model.unused(original)


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("awq", {"version": "gemv"}, r"\(awq\), .*version is 'gemv', only gemm is known"),
        ("awq", {"bits": 3}, r"\(awq\), .*bits is 3, only 4 is known"),
        ("awq", {"zero_point": False}, r"\(awq\), .*zero_point is false"),
        ("awq", {"group_size": 0}, r"\(awq\), .*group_size is 0"),
        ("gptq", {"checkpoint_format": "marlin"}, r"checkpoint_format is 'marlin', known are gptq and gptq_v2"),
        ("gptq", {"is_marlin_format": True}, r"checkpoint_format is 'marlin'"),
        ("gptq", {"bits": 5}, r"\(gptq\), .*bits is 5, known are 2, 3, 4, 8"),
        ("gptq", {"dynamic": {"-:.*": {}}}, r"\(gptq\), .*dynamic gives some layers settings of their own"),
        ("gptq", {"pack_dtype": "int16"}, r"\(gptq\), .*pack_dtype is 'int16'"),
        ("fp8, blocks", {"fmt": "e3m4"}, r"\(fp8\), .*fmt is 'e3m4'"),
        ("fp8, blocks", {"weight_block_size": [32]}, r"\(fp8\), .*weight_block_size is \[32\]"),
        ("packed int4", {"format": "marlin-24"}, r"_config format is 'marlin-24', known are pack-quantized"),
        ("packed int4", {"sparsity_config": {"format": "sparse-24"}}, r"sparsity_config has the format 'sparse-24"),
        ("packed int4", {"transform_config": {"config_groups": {}}}, r"transform_config names rotations"),
        ("packed int4", {"config_groups": {}}, r"config_groups is empty"),
        ("packed int4", {"config_groups": {"a": {"weights": {"num_bits": 3}}}}, r"num_bits is 3, known .* are 4 and 8"),
        ("awq", {"quant_method": "bitsandbytes"}, r"\(bitsandbytes\), .*supported: awq, gptq, fp8, compressed"),
        ("awq", {"quant_method": 7}, r"quantised \(7\)"),
        ("awq", {"a_setting_of_next_year": 1}, r"quantization_config\.a_setting_of_next_year = 1"),
        ("awq", {"bits": "4"}, r"quantization_config\.bits is '4'"),
    ],
)  # fmt: skip
def test_forms_that_are_not_known_are_refused_by_name(tmp_path, case, changes, message):
    folder, _ = write_checkpoint(tmp_path / "m", CASES[case], **changes)
    with pytest.raises(ModelLoadError, match=message):
        HFModel(folder)


@pytest.mark.parametrize(
    ("case", "end", "change", "message"),
    [
        ("awq", "qzeros", None, r"q_proj has no qzeros"),
        ("awq", "scales", lambda t: t[:1], r"q_proj has scales F16\[1, 64\], must be F32 or F16 or BF16\[2, 64\]"),
        ("gptq", "qzeros", lambda t: t[:, :1], r"q_proj has qzeros I32\[2, 1\], must be I32\[2, 8\]"),
        ("gptq", "g_idx", lambda t: t + 7, r"q_proj has groups in g_idx beyond its 2"),
        ("gptq", "g_idx", lambda t: t[:5], r"q_proj has g_idx I32\[5\], must be I32\[64\]"),
        ("fp8, blocks", "weight_scale_inv", None, r"q_proj has 0 of weight_scale_inv and weight_scale"),
        ("fp8, blocks", "weight_scale_inv", lambda t: t[:1], r"weight_scale_inv F32\[1, 2\], must be .*\[2, 2\]"),
        ("packed int4", "weight_shape", lambda t: t * 2, r"of shape \[128, 128\] has weight_packed of I32\[64, 8\]"),
        ("packed int4", "weight_scale", lambda t: t[:7], r"q_proj has weight_scale BF16\[7, 2\], must be .*\[64, 2\]"),
        ("packed int4, activation order", "weight_g_idx", lambda t: t - 1, r"q_proj has groups in weight_g_idx beyond"),
        ("int8, rows", "weight_scale", lambda t: t[:3], r"of shape \[64, 64\] has weight_scale of shape \[3, 1\]"),
        ("nvfp4", "weight_global_scale", None, r"q_proj has no weight_global_scale"),
    ],
)  # fmt: skip
def test_tensors_that_do_not_fit_together_are_refused(tmp_path, case, end, change, message):
    name = f"model.layers.0.self_attn.q_proj.{end}"

    def edit(stored):
        changed = stored.pop(name)
        if change is not None:
            stored[name] = np.ascontiguousarray(change(changed))

    folder, _ = write_checkpoint(tmp_path / "m", CASES[case], edit)
    with pytest.raises(ModelLoadError, match=message):
        packed_params(folder)


def test_tensors_that_no_method_reads_are_refused(tmp_path):
    def edit(stored):
        stored["model.layers.0.mlp.up_proj.codebook"] = np.zeros(4, np.float32)

    folder, _ = write_checkpoint(tmp_path / "m", CASES["awq"], edit)
    with pytest.raises(ModelLoadError, match=r"nothing here uses, among them model\.layers\.0\.mlp\.up_proj\.codebook"):
        packed_params(folder)


def test_packed_tensors_without_settings_are_refused(tmp_path):
    folder, _ = write_checkpoint(tmp_path / "m", CASES["awq"])
    change_config(folder, quantization_config=None)
    with pytest.raises(ModelLoadError, match=r"lacks 14 of \d+ tensors"):
        packed_params(folder)


def packed_params(folder):
    model = HFModel(folder)
    return pack_params(model.config, "fp32", model)
