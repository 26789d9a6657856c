"""Every tensor and every configuration key of a checkpoint is used, known to be harmless, or refused by name."""

import json
import logging
import shutil

import gguf
import numpy as np
import pytest
from gguf_files import add_tensor, finish, write_gguf
from model_oracle import FIXTURES, case_config, case_expected, case_tensors, flax_logits, float64_logits
from safetensors.numpy import save_file

from fineserve_jax.errors import ModelLoadError, RequestError
from fineserve_jax.loaders import load_model, render_chat
from fineserve_jax.loaders.gguf_config import gguf_config
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_model import GGUFModel
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.loaders.hf_tokenizer import hf_tokenizer, save_tokenizer
from fineserve_jax.models import LayerGroup, RopeScaling, build_model, pack_params


def _directory(tmp_path, case, tensors, **config):
    target = tmp_path / "model"
    shutil.copytree(FIXTURES / case, target)
    stated = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**stated, **config}))
    save_file(tensors, target / "model.safetensors")
    return target


def _logits(source, tokens):
    return flax_logits(build_model(source.config, "fp32"), pack_params(source.config, "fp32", source), tokens)


def _random(shape, seed=0):
    return (0.3 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attn_logit_softcapping", 30.0),
        ("final_logit_softcapping", 20.0),
        ("embedding_multiplier", 12.0),
        ("logits_scaling", 8.0),
        ("residual_multiplier", 0.22),
        ("attention_multiplier", 0.01),
        ("query_pre_attn_scalar", 256),
        ("sliding_window", 16),
        ("layer_types", ["sliding_attention", "full_attention"]),
        ("no_rope_layers", [0, 1]),
        ("num_local_experts", 8),
        ("use_qk_norm", True),
        ("clip_qkv", 8.0),
        ("a_key_of_next_year", 1),
    ],
)
def test_a_configuration_key_that_nothing_reads_is_refused_by_name(key, value):
    with pytest.raises(ModelLoadError, match=rf"config\.json: {key} = .*does not know what to do with it"):
        hf_config({**case_config("llama"), key: value})


@pytest.mark.parametrize(
    "extra",
    [
        {"attn_logit_softcapping": None, "residual_multiplier": 1.0, "num_experts": 0},
        {
            "_name_or_path": "x",
            "torch_dtype": "bfloat16",
            "use_cache": False,
            "pad_token_id": -1,
            "unsloth_fixed": True,
        },
        {"layer_types": ["full_attention", "full_attention"], "query_pre_attn_scalar": 16},
    ],
)
def test_keys_that_change_nothing_are_taken(extra):
    assert hf_config({**case_config("llama"), **extra}) == hf_config(case_config("llama"))


@pytest.mark.parametrize(
    ("rope", "complaint"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, r"'llama3' has no 'low_freq_factor'"),
        ({"rope_type": "linear"}, r"'linear' has no 'factor'"),
        ({"rope_type": "yarn", "factor": 0.0}, r"rope_parameters\.factor is 0\.0: .*greater than 0"),
        ({"rope_type": "yarn", "factor": 4.0, "long_factor": [1.0]}, r"rope_parameters\.long_factor = \[1\.0\]"),
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 1.0, "beta_slow": 2.0}, r"beta_slow 2\.0 must be"),
        ({"rope_type": "default", "factor": 4.0}, r"rope_parameters\.factor = 4\.0"),
        ({"full_attention": {"rope_type": "linear", "factor": 2.0}}, r"rope_parameters\.full_attention ="),
    ],
)
def test_rope_keys_are_read_or_refused(rope, complaint):
    with pytest.raises(ModelLoadError, match=complaint):
        hf_config({**case_config("smollm2"), "rope_parameters": rope})


def test_the_original_context_may_stand_beside_the_rope_table():
    rope = {"rope_type": "yarn", "factor": 4.0}
    config = hf_config({**case_config("smollm2"), "rope_parameters": rope, "original_max_position_embeddings": 32})
    assert config.rope_scaling == RopeScaling("yarn", 4.0, 32)


def test_gemma_3_reads_older_keys_like_newer_ones():
    newer = case_config("gemma3")
    rope = {"rope_theta": 1000000.0, "rope_local_base_freq": 10000.0}
    older = {key: value for key, value in newer.items() if key not in ("rope_parameters", "layer_types")}
    older |= {**rope, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window_pattern": 2}
    assert hf_config(older) == hf_config(newer)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported in Gemma 3"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ({"hidden_act": "silu"}, "hidden_activation 'gelu_pytorch_tanh' and hidden_act 'silu'"),
        (
            {"rope_parameters": {"sliding_attention": {"rope_type": "linear"}}},
            r"sliding_attention\.rope_type is 'linear'",
        ),
        ({"rope_parameters": {"full_attention": {}, "chunked": {}}}, r"rope_parameters\.chunked = {}"),
        ({"rope_parameters": {"sliding_attention": {"factor": 2.0}}}, r"sliding_attention\.factor = 2\.0"),
    ],
)
def test_what_gemma_3_does_not_have_is_refused(change, complaint):
    with pytest.raises(ModelLoadError, match=complaint):
        hf_config({**case_config("gemma3"), **change})


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model."])
def test_of_a_model_of_texts_and_images_the_text_part_is_read(tmp_path, caplog, prefix):
    tensors = {prefix + name.removeprefix("model."): tensor for name, tensor in case_tensors("gemma3").items()}
    vision = prefix.replace("language_model.model.", "").replace("language_model.", "")
    images = {vision + "vision_tower.a.weight": np.ones(3, np.float32)}
    images[vision + "multi_modal_projector.b"] = np.ones(2, np.float32)
    directory = _directory(tmp_path, "gemma3", {**tensors, **images})
    text = case_config("gemma3")
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": text, "vision_config": {"a": 1}}
    (directory / "config.json").write_text(json.dumps({**whole, "mm_tokens_per_image": 256, "eos_token_id": [1, 106]}))
    with caplog.at_level(logging.WARNING):
        source = HFModel(directory)
    assert "2 tensors are for images" in caplog.text
    tokens, expected = case_expected("gemma3")
    np.testing.assert_allclose(_logits(source, tokens), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", ["qwen2", "qwen3", "mistral"])
@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ("ss", (LayerGroup((0, 1), 32),)),
        ("ff", (LayerGroup((0, 1), None),)),
        ("sf", (LayerGroup((1,), None), LayerGroup((0,), 32))),
        ("s", "1 entries for 2 layers"),
        ("sx", "among them 'x'"),
    ],
)
def test_layer_types_say_which_layers_have_the_window(case, types, expected):
    names = {"s": "sliding_attention", "f": "full_attention"}
    used = {} if case == "mistral" else {"use_sliding_window": True}
    window = {**used, "sliding_window": 32, "layer_types": [names.get(t, t) for t in types]}
    raw = {**case_config(case), **window}
    if isinstance(expected, str):
        with pytest.raises(ModelLoadError, match=expected):
            hf_config(raw)
    else:
        assert hf_config(raw).layer_groups == expected


def test_stored_rotary_tables_are_harmless_and_other_tensors_are_not(tmp_path):
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32) for i in range(2)}
    source = HFModel(_directory(tmp_path, "smollm2", {**case_tensors("smollm2"), **tables}))
    pack_params(source.config, "fp32", source)
    bias = {"model.layers.1.self_attn.q_proj.bias": np.ones(64, np.float32)}
    source = HFModel(_directory(tmp_path / "b", "smollm2", {**case_tensors("smollm2"), **bias}))
    with pytest.raises(ModelLoadError, match=r"1 tensors that nothing here uses.*layers\.1\.self_attn\.q_proj\.bias"):
        pack_params(source.config, "fp32", source)


def test_a_head_that_differs_from_the_tied_embedding_is_used(tmp_path):
    tensors, (tokens, expected) = case_tensors("smollm2"), case_expected("smollm2")
    embedding = tensors["model.embed_tokens.weight"]
    same = HFModel(_directory(tmp_path / "a", "smollm2", {**tensors, "lm_head.weight": embedding.copy()}))
    assert same.config.tie_embeddings
    np.testing.assert_allclose(_logits(same, tokens), expected, rtol=1e-4, atol=1e-5)
    head = _random(embedding.shape)
    other = HFModel(_directory(tmp_path / "b", "smollm2", {**tensors, "lm_head.weight": head}))
    untied = float64_logits(other.config, {**tensors, "lm_head.weight": head}, tokens)
    np.testing.assert_allclose(_logits(other, tokens), untied, rtol=1e-4, atol=1e-5)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    directory = _directory(tmp_path, "smollm2", case_tensors("smollm2"))
    shutil.copy(directory / "model.safetensors", directory / "model-00001-of-00001.safetensors")
    with pytest.raises(ModelLoadError, match=r"is in more than one of 2 files"):
        HFModel(directory)


_BIASES = {
    "self_attn.k_proj": ("attn_k", 32),
    "self_attn.o_proj": ("attn_output", 64),
    "mlp.gate_proj": ("ffn_gate", 64),
    "mlp.up_proj": ("ffn_up", 64),
    "mlp.down_proj": ("ffn_down", 64),
}


@pytest.mark.parametrize("parts", [("mlp.up_proj",), ("self_attn.k_proj",), ("self_attn.o_proj",), tuple(_BIASES)])
def test_biases_of_gguf_files_are_used_also_single_ones(tmp_path, parts):
    """In the second layer only: the absent ones are zero."""
    values = {part: _random(_BIASES[part][1], index) for index, part in enumerate(parts)}

    def add(writer):
        for part, bias in values.items():
            stored = bias.reshape(2, 2, 8).swapaxes(1, 2).ravel() if part.endswith("k_proj") else bias
            add_tensor(writer, f"blk.1.{_BIASES[part][0]}.bias", stored)

    source = GGUFModel(GGUFFile(write_gguf(tmp_path / "m.gguf", "smollm2", more=add)))
    tokens, _ = case_expected("smollm2")
    tensors = case_tensors("smollm2") | {f"model.layers.1.{part}.bias": bias for part, bias in values.items()}
    expected = float64_logits(source.config, tensors, tokens)
    np.testing.assert_allclose(_logits(source, tokens), expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(
    "name",
    [
        "blk.0.attn_norm.bias",
        "blk.0.attn_q_norm.weight",
        "blk.2.ffn_up.weight",
        "rope_factors_long.weight",
        "cls.weight",
    ],
)
def test_a_gguf_tensor_that_nothing_uses_is_refused_by_name(tmp_path, name):
    path = write_gguf(tmp_path / "m.gguf", "smollm2", more=lambda w: add_tensor(w, name, np.ones(16, np.float32)))
    with pytest.raises(ModelLoadError, match=rf"nothing here uses, among them {name}"):
        load_model(path)


def test_a_qwen2_file_without_one_of_its_biases_is_incomplete(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "qwen2", leave_out=("blk.1.attn_k.bias",))
    with pytest.raises(ModelLoadError, match=r"lacks 1 of 26 tensors, first model\.layers\.1\.self_attn\.k_proj\.bias"):
        load_model(path)


def _gguf_with(tmp_path, **keys):
    def add(writer):
        for key, value in keys.items():
            name = "llama." + key.replace("__", ".")
            {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}[
                type(value)
            ](name, value)

    return GGUFFile(write_gguf(tmp_path / "m.gguf", "smollm2", more=add))


_YARN = {
    "rope__scaling__type": "yarn",
    "rope__scaling__factor": 4.0,
    "rope__scaling__original_context_length": 32,
}


def test_yarn_of_gguf_files_is_read_whole(tmp_path):
    band = {"rope__scaling__yarn_beta_fast": 8.0, "rope__scaling__yarn_beta_slow": 2.0}
    found = gguf_config(_gguf_with(tmp_path, **_YARN, **band)).rope_scaling
    assert found == RopeScaling("yarn", 4.0, 32, beta_fast=8.0, beta_slow=2.0)
    found = gguf_config(_gguf_with(tmp_path, **_YARN, rope__scaling__attn_factor=0.5)).rope_scaling
    assert found.attention_factor == pytest.approx(0.5 * (0.1 * np.log(4.0) + 1.0))


def test_a_rope_factor_of_zero_means_none(tmp_path):
    plain = gguf_config(_gguf_with(tmp_path))
    assert gguf_config(_gguf_with(tmp_path, rope__scaling__type="linear", rope__scaling__factor=0.0)) == plain


@pytest.mark.parametrize(
    "keys",
    [
        {**_YARN, "rope__scaling__yarn_ext_factor": 0.5},
        {**_YARN, "rope__scaling__yarn_log_multiplier": 0.1},
        {"attn_logit_softcapping": 30.0},
        {"attention__causal": False},
        {"attention__scale": 0.5},
        {"attention__value_length": 32},
        {"logit_scale": 0.5},
        {"pooling_type": 3},
        {"vocab_size": 95},
        {"rope__scaling__attn_factor": 2.0},
        {"a_key_of_next_year": 1},
    ],
)
def test_gguf_keys_that_would_change_numbers_are_refused_by_name(tmp_path, keys):
    name = list(keys)[-1].split("__")[-1].replace("value_length", "values of 32")
    with pytest.raises(ModelLoadError, match=name):
        gguf_config(_gguf_with(tmp_path, **keys))


def test_gguf_keys_that_change_nothing_are_taken(tmp_path):
    keys = {
        "attention__causal": True,
        "attention__scale": 0.25,
        "pooling_type": 0,
        "vocab_size": 96,
        "logit_scale": 0.0,
    }
    assert gguf_config(_gguf_with(tmp_path, **keys)) == gguf_config(_gguf_with(tmp_path))


def _tokenizer_file(path, tokens, types=None, pre="default", merges=("h e",)):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_merges(list(merges))
    if types:
        writer.add_token_types(types)
    return GGUFFile(finish(writer, path))


def test_two_ids_of_one_text_both_decode_also_after_conversion(tmp_path):
    tokenizer = gguf_tokenizer(_tokenizer_file(tmp_path / "t.gguf", ["h", "e", "he", "he"], [1] * 4))
    assert tokenizer.decode([2, 3]) == "hehe"
    assert (tokenizer.token_text(2), tokenizer.vocab_size, tokenizer.encode("he")) == ("he", 4, [3])
    save_tokenizer(tokenizer, tmp_path)
    assert hf_tokenizer(tmp_path).decode([2, 3]) == "hehe"


def test_what_a_gguf_tokenizer_leaves_out_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = gguf_tokenizer(_tokenizer_file(tmp_path / "t.gguf", ["h", "e", "he", "<|im_start|>"], pre=None))
    assert tokenizer.encode("he<|im_start|>") == [2, 3]
    warned = " ".join(caplog.messages)
    assert "tokenizer.ggml.pre" in warned
    assert "tokenizer.ggml.token_type" in warned


def _companions(directory, **files):
    backend = gguf_tokenizer(_tokenizer_file(directory / "t.gguf", ["h", "e", "he", "<s>"], [1] * 4)).backend
    backend.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return hf_tokenizer(directory)


def test_special_tokens_named_only_in_their_map_are_known(tmp_path):
    named = {"eos_token": {"content": "he"}, "bos_token": "<s>"}
    tokenizer = _companions(tmp_path, special_tokens_map=named)
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((2,), 3)
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "he"}


def test_tokens_added_only_in_a_companion_file_are_known(tmp_path):
    turn = {"4": {"content": "<|turn|>", "special": True, "normalized": False}}
    tokenizer = _companions(tmp_path, tokenizer_config={"eos_token": "<|turn|>", "added_tokens_decoder": turn})
    assert (tokenizer.encode("he<|turn|>"), tokenizer.eos_token_ids) == ([2, 4], (4,))
    assert tokenizer.decode([2, 4]) == "he"
    older = _companions(tmp_path, tokenizer_config={}, added_tokens={"<tool>": 4})
    assert older.encode("he<tool>") == [2, 4]


@pytest.mark.parametrize(
    ("files", "special"),
    [
        ({"tokenizer_config": {"mask_token": "e"}}, "e"),
        ({"tokenizer_config": {"additional_special_tokens": ["e", {"content": "<none>"}]}}, "e"),
        ({"tokenizer_config": {"extra_special_tokens": {"tool": {"content": "e"}}}}, "e"),
        ({"special_tokens_map": {"extra_special_tokens": ["e"]}}, "e"),
        ({"special_tokens_map": {"pad_token": "<s>"}}, "<s>"),
    ],
)
def test_tokens_that_a_companion_names_are_special(tmp_path, files, special):
    tokenizer = _companions(tmp_path, **files)
    ids = {"e": 1, "<s>": 3}
    assert tokenizer.special_ids == {special: ids[special]}
    text = f"h{special}h"
    assert tokenizer.encode(text) == [0, ids[special], 0]
    assert (tokenizer.decode([0, ids[special], 0]), tokenizer.vocab_size) == ("hh", 4)


def test_several_chat_templates_without_a_default_are_named(tmp_path):
    templates = [{"name": "tool_use", "template": "T"}, {"name": "rag", "template": "R"}]
    tokenizer = _companions(tmp_path, tokenizer_config={"chat_template": templates})
    with pytest.raises(RequestError, match="several chat templates, none is the default; they are rag, tool_use"):
        render_chat(tokenizer, [{"role": "user", "content": "a"}])


def test_a_manifest_without_its_entries_is_refused(tmp_path):
    (tmp_path / "fineserve.json").write_text(json.dumps({"format_version": 1, "weights": 8}))
    with pytest.raises(ModelLoadError, match=r"fineserve\.json: weights is 8: .*config"):
        load_model(tmp_path)


def test_an_added_token_that_cannot_have_its_id_is_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        _companions(tmp_path, added_tokens={"<tool>": 9, "<other>": 1})
    assert "'<tool>'" in " ".join(caplog.messages)
    assert "'<other>'" in " ".join(caplog.messages)


def test_named_tokens_and_ends_that_do_not_exist_are_warned_of(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        tokenizer = _companions(
            tmp_path,
            tokenizer_config={"eos_token": "<none>", "bos_token": "<s>"},
            generation_config={"eos_token_id": [2, 99]},
        )
    assert tokenizer.eos_token_ids == (2, 99)
    assert "eos_token is '<none>', which is no token of tokenizer.json" in " ".join(caplog.messages)
    assert "eos_token_id 99 is no token of tokenizer.json" in " ".join(caplog.messages)
    assert "bos_token" not in " ".join(caplog.messages)


def test_keys_of_a_gguf_tokenizer_that_nothing_reads_are_warned_of(tmp_path, caplog):
    def more(writer):
        writer.add_array("tokenizer.ggml.suppress_tokens", [1, 2])
        writer.add_uint32("tokenizer.ggml.fim_pre_token_id", 1)
        writer.add_string("tokenizer.chat_template.rag", "{{ messages }}")

    with caplog.at_level(logging.WARNING):
        gguf_tokenizer(GGUFFile(write_gguf(tmp_path / "t.gguf", "smollm2", more=more)))
    assert caplog.text.count("which nothing here reads") == 1
    assert "'tokenizer.ggml.suppress_tokens', which nothing here reads" in caplog.text


def test_merges_of_unknown_tokens_are_refused(tmp_path):
    for merge in ("he", "h x", "e h", " "):
        file = _tokenizer_file(tmp_path / "t.gguf", ["h", "e", "he"], [1] * 3, merges=(merge,))
        with pytest.raises(ModelLoadError, match=rf"t\.gguf: tokenizer\.ggml\.merges\[0\] is '{merge}'"):
            gguf_tokenizer(file)
