"""Models out of GGUF files compute what the checkpoint they were converted from computes."""

import dataclasses

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf_files import ARCHITECTURES, add_byte_tokenizer, add_tensor, finish, permuted, write_gguf
from hypothesis import given
from hypothesis import strategies as st
from model_oracle import case_config, case_expected, case_tensors, flax_logits, float64_logits

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import load_model
from fineserve_jax.loaders.gguf_config import gguf_config
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.laid_out_tensors import unpermute_heads
from fineserve_jax.models import LayerGroup, RopeScaling, build_model


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_unquantised_files_give_the_logits_of_the_checkpoint(tmp_path, case):
    """The q/k permutation, spelled-out RoPE factors, biases, q/k norms and tied heads all matter here."""
    model = load_model(write_gguf(tmp_path / "m.gguf", case), "fp32")
    tokens, expected = case_expected(case)
    found = flax_logits(build_model(model.config, "fp32"), model.params, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("quant", ["BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_files_give_the_logits_of_their_dequantised_tensors(tmp_path, quant):
    model = load_model(write_gguf(tmp_path / "m.gguf", "qwen3", Type[quant]), "fp32")
    tensors = {
        name: gguf.dequantize(gguf.quantize(t.astype(np.float32), Type[quant]), Type[quant]) if t.ndim > 1 else t
        for name, t in case_tensors("qwen3").items()
    }
    tokens, _ = case_expected("qwen3")
    expected = float64_logits(model.config, tensors, tokens)
    found = flax_logits(build_model(model.config, "fp32"), model.params, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


@given(heads=st.integers(1, 5), half=st.integers(1, 8), trailing=st.sampled_from([(), (3,)]))
def test_unpermuting_undoes_the_converters_permutation(heads, half, trailing):
    rows = heads * 2 * half
    tensor = np.arange(rows * int(np.prod(trailing))).reshape(rows, *trailing)
    np.testing.assert_array_equal(unpermute_heads(permuted(tensor, heads), heads), tensor)


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_the_configuration_equals_that_of_config_json(tmp_path, case):
    found = gguf_config(GGUFFile(write_gguf(tmp_path / "m.gguf", case)))
    expected = hf_config(case_config(case))
    stated = {"rope_scaling": None, "family": case if case in ("mixtral", "olmo3") else found.family}
    assert dataclasses.replace(found, **stated) == dataclasses.replace(expected, rope_scaling=None)
    assert (found.rope_scaling is None) == (expected.rope_scaling is None)
    if expected.rope_scaling is not None and found.rope_scaling != expected.rope_scaling:
        assert found.rope_scaling.kind == ("longrope" if expected.long_after is not None else "factors")


def _bare(path, architecture="llama", **extra):
    """A file with metadata of a llama, or of another architecture, and only an embedding."""
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 2,
        "feed_forward_length": 64,
        "attention.head_count": 4,
    }
    for key, number in numbers.items():
        writer.add_uint32(f"{architecture}.{key}", extra.pop(key, number))
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    for key, value in extra.items():
        name = f"{architecture}.{key.replace('__', '.')}"
        add = {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
        add[type(value)](name, value)
    add_byte_tokenizer(writer)
    add_tensor(writer, "token_embd.weight", np.zeros((96, 64), np.float32))
    return GGUFFile(finish(writer, path))


def test_optional_metadata_have_the_formats_defaults(tmp_path):
    config = gguf_config(_bare(tmp_path / "m.gguf"))
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (4, 16, 10000.0)
    assert (config.norm_eps, config.vocab_size, config.tie_embeddings) == (1e-5, 96, True)
    assert config.rope_scaling is None


def test_rope_scaling_metadata_are_read(tmp_path):
    linear = _bare(tmp_path / "a.gguf", rope__scaling__type="linear", rope__scaling__factor=4.0)
    assert gguf_config(linear).rope_scaling == RopeScaling("linear", 4.0, 128)
    old = _bare(tmp_path / "b.gguf", rope__scale_linear=2.0)
    assert gguf_config(old).rope_scaling == RopeScaling("linear", 2.0, 128)
    yarn = _bare(
        tmp_path / "c.gguf",
        rope__scaling__type="yarn",
        rope__scaling__factor=8.0,
        rope__scaling__original_context_length=32,
    )
    assert gguf_config(yarn).rope_scaling == RopeScaling("yarn", 8.0, 32)


def test_sliding_windows_are_read(tmp_path):
    """In a file called llama every layer has the window, unless the file says which do."""
    for window, pattern, expected in (
        (96, None, (LayerGroup((0, 1), 96),)),
        (0, None, (LayerGroup((0, 1), None),)),
        (None, None, (LayerGroup((0, 1), None),)),
        (96, 2, (LayerGroup((1,), None), LayerGroup((0,), 96))),
        (96, [False, True], (LayerGroup((0,), None), LayerGroup((1,), 96))),
        (96, 1, (LayerGroup((0, 1), None),)),
    ):
        keys = {"attention__sliding_window": window, "attention__sliding_window_pattern": pattern}
        file = _bare(tmp_path / "m.gguf", **{key: value for key, value in keys.items() if value is not None})
        assert gguf_config(file).layer_groups == expected
    file = _bare(tmp_path / "m.gguf", attention__sliding_window=96, attention__sliding_window_pattern=[True])
    with pytest.raises(ModelLoadError, match=r"sliding_window_pattern has 1 entries for 2 layers"):
        gguf_config(file)


def test_a_gemma_2_file_leaves_out_what_all_have(tmp_path):
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    config = gguf_config(_bare(tmp_path / "a.gguf", "gemma2", block_count=4, **caps))
    assert config.layer_groups == (LayerGroup((1, 3), None), LayerGroup((0, 2), 4096))
    assert (config.attention_soft_cap, config.logit_soft_cap, config.activation) == (50.0, 30.0, "gelu_tanh")
    assert (config.embedding_multiplier, config.attention_scale) == (8.0, 0.25)
    largest = _bare(tmp_path / "b.gguf", "gemma2", block_count=46, attention__key_length=32, **caps)
    assert gguf_config(largest).attention_scale == 0.25


def test_a_gemma_3_file_leaves_out_which_layers_have_the_window(tmp_path):
    config = gguf_config(_bare(tmp_path / "a.gguf", "gemma3", block_count=7, attention__sliding_window=8))
    assert config.layer_groups == (LayerGroup((5,), None), LayerGroup((0, 1, 2, 3, 4, 6), 8))
    assert (config.local_rope_theta, config.qk_norm, config.post_norms) == (10000.0, True, True)


def test_what_files_of_gpt_oss_do_not_say_is_known(tmp_path):
    keys = {
        "attention__sliding_window": 8,
        "expert_count": 4,
        "expert_used_count": 2,
        "expert_feed_forward_length": 32,
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": 4.0,
    }
    config = gguf_config(_bare(tmp_path / "m.gguf", "gpt-oss", **keys))
    assert config.full_attention_layers == (1,)
    assert (config.gate_limit, config.gate_slope, config.attention_sinks) == (7.0, 1.702, True)
    assert not config.rope_scaling.truncate
    assert (config.experts.count, config.experts.used, config.experts.intermediate_size) == (4, 2, 32)


def test_windows_of_olmo3_have_a_rope_that_is_not_scaled(tmp_path):
    scaled = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0, "rope__freq_base": 500000.0}
    windowed = gguf_config(_bare(tmp_path / "a.gguf", "olmo2", attention__sliding_window=8, **scaled))
    assert (windowed.local_rope_theta, windowed.rope_scaling.kind) == (500000.0, "yarn")
    assert gguf_config(_bare(tmp_path / "b.gguf", "olmo2", **scaled)).local_rope_theta is None


def test_embedding_models_are_refused_with_a_word_that_they_are(tmp_path):
    with pytest.raises(ModelLoadError, match=r"is an embedding model \(pooling_type 3\)"):
        gguf_config(_bare(tmp_path / "m.gguf", "qwen3", pooling_type=3))


def test_a_window_without_a_word_on_which_layers_have_it_is_refused(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", more=lambda w: w.add_uint32("qwen2.attention.sliding_window", 8))
    with pytest.raises(ModelLoadError, match=r"sliding_window is 8, without attention\.sliding_window_pattern"):
        load_model(path)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"expert_count": 8, "expert_used_count": 2, "expert_shared_count": 1}, r"expert_shared_count = 1"),
        ({"rope__dimension_count": 8}, r"rotates 8 of 16 values"),
        ({"rope__scaling__type": "longrope", "rope__scaling__factor": 2.0}, r"'longrope' is not supported"),
    ],
)
def test_features_that_would_change_results_silently_are_refused(tmp_path, extra, message):
    with pytest.raises(ModelLoadError, match=message):
        gguf_config(_bare(tmp_path / "m.gguf", **extra))


def test_an_unsupported_architecture_is_refused_with_the_supported_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    with pytest.raises(
        ModelLoadError, match=r"'mamba' is not supported; supported: cohere2, gemma2, gemma3, gpt-oss, gr"
    ):
        load_model(finish(writer, tmp_path / "m.gguf"))


def test_missing_metadata_tensors_and_tokenizers_are_named(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "qwen2", leave_out=("block_count",))
    with pytest.raises(ModelLoadError, match=r"no metadata 'qwen2\.block_count'"):
        load_model(path)
    path = write_gguf(tmp_path / "b.gguf", "qwen2", leave_out=("blk.1.ffn_up.weight",))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 26 tensors, first model\.layers\.1\.mlp\.up_proj"):
        load_model(path)
    path = write_gguf(tmp_path / "c.gguf", "qwen2", tokenizer=False)
    with pytest.raises(ModelLoadError, match=r"c\.gguf holds no tokenizer"):
        load_model(path)


def test_a_tensor_of_another_shape_than_configured_is_refused(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", "qwen2", leave_out=("feed_forward_length",))
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "qwen2")
    whole = GGUFFile(path)
    for key, number in whole.metadata.items():
        if key.startswith("qwen2.") and isinstance(number, int):
            writer.add_uint32(key, number)
    writer.add_uint32("qwen2.feed_forward_length", 32)
    writer.add_float32("qwen2.attention.layer_norm_rms_epsilon", 1e-6)
    add_byte_tokenizer(writer)
    for name in whole.tensors:
        add_tensor(writer, name, whole.read(name))
    with pytest.raises(ModelLoadError, match=r"gate_proj\.weight has shape \[64, 64\].*implies \[32, 64\]"):
        load_model(finish(writer, tmp_path / "b.gguf"))
