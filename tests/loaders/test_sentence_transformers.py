"""Directories of sentence-transformers: what their files say is read, or refused by its name."""

import json

import jax
import numpy as np
import pytest
from embedding_model import CASE, LAST, MEAN, write_embedding_model
from model_oracle import case_tensors
from safetensors.numpy import save_file

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import convert, load_model
from fineserve_jax.loaders.load import describe_model
from fineserve_jax.loaders.pooling_settings import PoolingSettings


def _write(path, content):
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("pooling", "further", "expected"),
    [
        (LAST, ("Normalize",), PoolingSettings("last", True, has_head=False)),
        (MEAN, (), PoolingSettings("mean", False, has_head=False)),
        ({}, (), PoolingSettings("mean", False, has_head=False)),
        ({"pooling_mode": "lasttoken"}, (), PoolingSettings("last", False, has_head=False)),
        ({"pooling_mode": ["mean"]}, (), PoolingSettings("mean", False, has_head=False)),
    ],
)
def test_pooling_and_normalisation_are_what_the_files_say(tmp_path, pooling, further, expected):
    directory = write_embedding_model(tmp_path / "m", pooling, *further)
    if "pooling_mode" in pooling:  # newer files have no flags
        _write(directory / "1_Pooling" / "config.json", {"embedding_dimension": 64, "include_prompt": True, **pooling})
    assert describe_model(directory).pooling == expected


@pytest.mark.parametrize("architecture", ["Qwen3ForCausalLM", "Qwen3Model"])
def test_a_head_is_what_the_architecture_or_a_tensor_has(tmp_path, architecture):
    tied = write_embedding_model(tmp_path / "a", LAST, architectures=[architecture], tie_word_embeddings=True)
    assert describe_model(tied).pooling.has_head is (architecture == "Qwen3ForCausalLM")
    stored = write_embedding_model(tmp_path / "b", LAST, architectures=[architecture])
    save_file(case_tensors(CASE), stored / "model.safetensors")
    assert describe_model(stored).pooling.has_head
    assert not describe_model(stored).config.tie_embeddings


def test_weights_are_those_of_the_language_model_but_for_its_head_also_when_converted(tmp_path):
    directory = write_embedding_model(tmp_path / "m", LAST, "Normalize", architectures=["Qwen3Model"])
    found, whole = load_model(directory, "fp32"), write_embedding_model(tmp_path / "whole", LAST)
    save_file(case_tensors(CASE), whole / "model.safetensors")
    expected = load_model(whole, "fp32").params
    assert found.params.keys() == expected.keys() - {"lm_head"}
    jax.tree.map(np.testing.assert_array_equal, found.params, {name: expected[name] for name in found.params})
    convert(directory, tmp_path / "converted", "fp32")
    converted = load_model(tmp_path / "converted", "fp32")
    assert (converted.pooling, converted.config) == (found.pooling, found.config)
    jax.tree.map(np.testing.assert_array_equal, converted.params, found.params)


@pytest.mark.parametrize(
    ("pooling", "error"),
    [
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, r"pooling \['cls'\] is not supported"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, r"pooling \['max'\] is not supp"),
        (LAST | {"pooling_mode_mean_tokens": True}, r"pooling \['mean', 'lasttoken'\] is not supported"),
        ({"pooling_mode_lasttoken": True}, r"pooling \['mean', 'lasttoken'\] is not supported"),  # a default is on
        (
            {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True},
            r"pooling \['weightedmean'\] is not supported; supported is one of mean, lasttoken; use a model of mean",
        ),
        ({"pooling_mode_mean_tokens": False}, r"pooling \[\] is not supported"),
        (MEAN | {"include_prompt": False}, "include_prompt = False: tokens of a prompt do not count"),
        (MEAN | {"pooling_mode_lasttoken": 1}, "pooling_mode_lasttoken is 1; it must be true or false"),
        (MEAN | {"pooling_mode": "lasttoken"}, "pooling_mode = 'lasttoken' is beside pooling_mode_"),
        (MEAN | {"left_out": 3}, "left_out = 3 is not known here"),
    ],
)
def test_poolings_that_are_not_computed_are_refused(tmp_path, pooling, error):
    with pytest.raises(ModelLoadError, match=rf"1_Pooling/config\.json: {error}"):
        load_model(write_embedding_model(tmp_path / "m", pooling))


@pytest.mark.parametrize(
    ("modules", "error"),
    [
        ([], r"lists \[\], which this engine does not compute"),
        ([("Transformer", "")], r"lists \['Transformer'\]"),
        ([("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense")], "lists .*'Dense'.*; it computes Trans"),
        ([("Transformer", "0_Transformer"), ("Pooling", "1_Pooling")], "has the Transformer in '0_Transformer'; move"),
        ([("Transformer", ""), ("Pooling", "../1_Pooling")], "must be inside the directory"),
        ([("Transformer", None)], "each needs a type and a path"),
    ],
)
def test_other_modules_are_refused(tmp_path, modules, error):
    directory = write_embedding_model(tmp_path / "m", LAST)
    _write(directory / "modules.json", [{"type": f"a.package.{kind}", "path": path} for kind, path in modules])
    with pytest.raises(ModelLoadError, match=rf"modules\.json .*{error}"):
        load_model(directory)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"is_causal": False}, "is_causal = False: tokens see those behind them"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention = True: tokens see those behind them"),
        ({"auto_map": {"AutoModel": "modeling.M"}}, "auto_map = .*is computed by code of its own"),
        ({"architectures": ["BertModel"]}, "'BertForCausalLM' is not supported"),
    ],
)
def test_models_that_are_not_causal_or_not_known_are_refused(tmp_path, changes, error):
    with pytest.raises(ModelLoadError, match=error):
        load_model(write_embedding_model(tmp_path / "m", LAST, **changes))


def test_texts_are_refused_that_would_be_other_tokens(tmp_path):
    directory = write_embedding_model(tmp_path / "m", LAST)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": True})
    with pytest.raises(ModelLoadError, match=r"sentence_bert_config\.json: do_lower_case is on"):
        load_model(directory)
    _write(directory / "sentence_bert_config.json", {"max_seq_length": 512, "do_lower_case": False})
    settings = directory / "tokenizer_config.json"
    _write(settings, json.loads(settings.read_text()) | {"add_eos_token": True})
    assert describe_model(directory).tokenizer.encode("ab")[-1] == 0
    tokenizer = directory / "tokenizer.json"
    _write(tokenizer, json.loads(tokenizer.read_text()) | {"post_processor": None})
    with pytest.raises(ModelLoadError, match=r"add_eos_token on, and tokenizer\.json adds none"):
        load_model(directory)


def test_a_prompt_that_would_be_added_is_told_of_and_files_must_be_complete(tmp_path, caplog):
    directory = write_embedding_model(tmp_path / "m", LAST)
    settings = {"prompts": {"query": "Find: "}, "default_prompt_name": None}
    _write(directory / "config_sentence_transformers.json", settings)
    describe_model(directory)
    assert "is not put in front" not in caplog.text
    _write(directory / "config_sentence_transformers.json", settings | {"default_prompt_name": "query"})
    describe_model(directory)
    assert "the prompt 'query' is not put in front of texts" in caplog.text
    (directory / "modules.json").unlink()
    with pytest.raises(ModelLoadError, match=r"has no modules\.json, which says how its vectors are made; fetch all"):
        load_model(directory)
    _write(directory / "modules.json", {})
    with pytest.raises(ModelLoadError, match="holds a JSON dict, expected a list"):
        load_model(directory)
