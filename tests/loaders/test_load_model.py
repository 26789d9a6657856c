"""`load_model` and `convert`: every kind of source, and every refusal before weights are read."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gguf_files import write_gguf
from model_oracle import CASES, FIXTURES, case_config, case_expected, case_tensors, flax_logits
from safetensors.numpy import save_file

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders import convert, load_model
from fineserve_jax.loaders.checkpoint_params import save_params
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_tokenizer import gguf_tokenizer
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.loaders.hf_tokenizer import save_tokenizer
from fineserve_jax.models import LayerGroup, RopeScaling, build_model


@pytest.fixture
def checkpoint(tmp_path):
    """A writable copy of a fixture checkpoint, with a tokenizer."""

    def copy(case):
        target = tmp_path / case
        shutil.copytree(FIXTURES / case, target)
        save_tokenizer(gguf_tokenizer(GGUFFile(write_gguf(tmp_path / f"{case}.gguf", "smollm2"))), target)
        return target

    return copy


def _change_config(directory, **changes):
    config = json.loads((directory / "config.json").read_text())
    config = {key: value for key, value in {**config, **changes}.items() if value != "absent"}
    (directory / "config.json").write_text(json.dumps(config))


def _logits(model, tokens):
    return flax_logits(build_model(model.config, model.weights), model.params, tokens)


@pytest.mark.parametrize("shards", [2, 3])
def test_sharded_checkpoints_load_as_whole_ones(checkpoint, shards):
    directory = checkpoint("qwen3")
    tensors = case_tensors("qwen3")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for part in range(shards):
        name = f"model-{part + 1:05}-of-{shards:05}.safetensors"
        mine = {key: tensors[key] for key in sorted(tensors)[part::shards]}
        weight_map |= dict.fromkeys(mine, name)
        save_file(mine, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    tokens, expected = case_expected("qwen3")
    np.testing.assert_allclose(_logits(load_model(directory, "fp32"), tokens), expected, rtol=1e-4, atol=1e-5)
    (directory / name).unlink()
    with pytest.raises(ModelLoadError, match=rf"{name} is missing, although"):
        load_model(directory)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float32, np.float64])
def test_tensors_of_every_float_type_are_read(checkpoint, dtype):
    directory = checkpoint("smollm2")
    tensors = {name: tensor.astype(dtype) for name, tensor in case_tensors("smollm2").items()}
    save_file(tensors, directory / "model.safetensors")
    params = load_model(directory, "fp32").params
    expected = tensors["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(params["layers_1"]["mlp"]["down"]["kernel"], expected)


def test_older_config_files_mean_the_same(checkpoint):
    directory = checkpoint("llama")
    modern = hf_config(case_config("llama"))
    rope = case_config("llama")["rope_parameters"]
    theta = rope.pop("rope_theta")
    rope["type"] = rope.pop("rope_type")
    _change_config(directory, rope_parameters="absent", rope_scaling=rope, rope_theta=theta, head_dim="absent")
    assert load_model(directory).config == modern


@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
def test_a_converted_directory_gives_bit_identical_logits(checkpoint, tmp_path, weights):
    source = checkpoint("qwen3")
    written = convert(source, tmp_path / "converted", weights)
    shutil.rmtree(source)
    loaded = load_model(tmp_path / "converted", weights)
    assert (loaded.config, loaded.weights, loaded.name) == (written.config, weights, "converted")
    tokens, _ = case_expected("qwen3")
    np.testing.assert_array_equal(_logits(loaded, tokens), _logits(written, tokens))
    assert loaded.tokenizer.encode("he<|end|>") == written.tokenizer.encode("he<|end|>") == [92, 93]
    assert loaded.tokenizer.eos_token_ids == written.tokenizer.eos_token_ids


def test_a_converted_directory_keeps_its_precision(checkpoint, tmp_path):
    convert(checkpoint("smollm2"), tmp_path / "out", "int8")
    assert load_model(tmp_path / "out", None).weights == "int8"
    with pytest.raises(ModelLoadError, match=r"holds int8 weights, bf16 was asked for; use weights='int8'"):
        load_model(tmp_path / "out")


def test_conversion_never_writes_over_anything(checkpoint, tmp_path):
    source, target = checkpoint("smollm2"), tmp_path / "out"
    target.mkdir()
    convert(source, target, "bf16")  # an empty directory is fine
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ModelLoadError, match=r"out exists and is not an empty directory"):
        convert(source, target, "bf16")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_damaged_converted_directory_is_refused(checkpoint, tmp_path):
    convert(checkpoint("smollm2"), tmp_path / "out", "bf16")
    shutil.rmtree(tmp_path / "out" / "params")
    with pytest.raises(ModelLoadError, match=r"params cannot be restored.*convert the model again"):
        load_model(tmp_path / "out")
    (tmp_path / "out" / "fineserve.json").write_text('{"format_version": 99}')
    with pytest.raises(ModelLoadError, match=r"checkpoint format 99, this version reads 1"):
        load_model(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda params: params.pop("norm"), r"'norm'.*'scale'.* is missing"),
        (lambda params: params.update(adapter={"kernel": np.ones(3)}), r"'adapter'.*'kernel'.* is not expected"),
        (lambda params: params["norm"].update(scale=np.ones(3, np.float32)), r"norm.scale is float32\[3\], float32\["),
        (
            lambda params: params["norm"].update(scale=np.ones(64, np.int32)),
            r"norm.scale is int32\[64\], float32\[64\]",
        ),
    ],
    ids=["one is missing", "one too many", "another shape", "another type"],
)
def test_parameters_of_another_model_are_refused(checkpoint, tmp_path, change, error):
    model = convert(checkpoint("smollm2"), tmp_path / "out", "bf16")
    params = jax.tree.map(np.asarray, model.params)
    change(params)
    shutil.rmtree(tmp_path / "out" / "params")
    save_params(tmp_path / "out" / "params", params)
    with pytest.raises(ModelLoadError, match=rf"params cannot be restored: .*{error}.*convert the model again"):
        load_model(tmp_path / "out")


def test_conversion_from_gguf_and_loading_leave_no_other_precision(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", "llama")
    convert(path, tmp_path / "out", "int8")
    direct, converted = load_model(path, "int8"), load_model(tmp_path / "out", "int8")
    jax.tree.map(np.testing.assert_array_equal, direct.params, converted.params)
    assert direct.name == "m"


def test_an_unknown_source_is_refused_with_what_is_accepted(tmp_path):
    with pytest.raises(ModelLoadError, match=r"'no-such-model' is neither .*smollm2-135m.*\.gguf file.*convert"):
        load_model("no-such-model")
    with pytest.raises(ModelLoadError, match=r"is a directory without config\.json"):
        load_model(tmp_path)
    with pytest.raises(ModelLoadError, match=r"'fp8' is not a known weight precision"):
        load_model("no-such-model", "fp8")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, r"'GPT2LMHeadModel' is not supported; supported: .*Llama"),
        ({"architectures": "absent"}, r"'\(none stated\)' is not supported"),
        ({"hidden_size": "absent"}, r"no 'hidden_size', which Qwen3ForCausalLM needs"),
        ({"hidden_act": "gelu"}, r"hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "gptq"}}, r"quantised \(gptq\)"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"'dynamic' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor 0.5"),
        ({"intermediate_size": 128}, r"gate_proj\.weight has shape \[64, 64\].*implies \[128, 64\]"),
        (
            {"num_hidden_layers": 3, "layer_types": "absent"},
            r"lacks 11 of 36 tensors, first model\.layers\.2\.input_layernorm",
        ),
    ],
)
def test_unsuitable_configurations_are_refused(checkpoint, changes, complaint):
    directory = checkpoint("qwen3")
    _change_config(directory, **changes)
    with pytest.raises(ModelLoadError, match=complaint):
        load_model(directory)


def test_missing_and_damaged_files_are_refused(checkpoint):
    directory = checkpoint("qwen2")
    weights, tokenizer = directory / "model.safetensors", directory / "tokenizer.json"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=r"not a readable safetensors file"):
        load_model(directory)
    weights.write_bytes(content)
    tokenizer.unlink()
    with pytest.raises(ModelLoadError, match=r"has no tokenizer\.json"):
        load_model(directory)
    weights.unlink()
    with pytest.raises(ModelLoadError, match=r"has no model\*\.safetensors"):
        load_model(directory)
    (directory / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json is not valid JSON"):
        load_model(directory)


def test_integer_tensors_are_refused_by_type(checkpoint):
    directory = checkpoint("smollm2")
    tensors = case_tensors("smollm2")
    tensors["model.norm.weight"] = np.ones(64, np.int8)
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"model\.norm\.weight is of type I8.*supported: F64, F32"):
        load_model(directory)


@pytest.mark.parametrize(
    ("used", "first", "expected"),
    [
        (False, 0, (LayerGroup((0, 1), None),)),
        (True, 0, (LayerGroup((0, 1), 8),)),
        (True, 1, (LayerGroup((0,), None), LayerGroup((1,), 8))),
        (True, 2, (LayerGroup((0, 1), None),)),
    ],
)
def test_without_layer_types_qwens_windows_begin_at_a_layer(used, first, expected):
    older = {key: value for key, value in case_config("qwen2").items() if key != "layer_types"}
    window = {"use_sliding_window": used, "max_window_layers": first, "sliding_window": 8}
    assert hf_config({**older, **window}).layer_groups == expected


def test_a_mistral_window_of_null_means_none():
    assert hf_config({**case_config("mistral"), "sliding_window": None}).sliding_window is None
    assert hf_config(case_config("mistral")).sliding_window == 12


@pytest.mark.parametrize(
    ("architecture", "what"),
    [
        ("Qwen3Model", "a model without an output head, as embedding models are"),
        ("Qwen2ForSequenceClassification", "a model that scores or classifies texts"),
        ("Qwen2ForRewardModel", "a model that scores or classifies texts"),
    ],
)
def test_models_of_other_tasks_are_refused_with_a_word_that_they_are(architecture, what):
    with pytest.raises(ModelLoadError, match=rf"'{architecture}' is {what}.*use a language model"):
        hf_config({**case_config("qwen3"), "architectures": [architecture]})


def test_embedding_models_are_refused_with_a_word_that_they_are(tmp_path):
    """By the tensors of a model without a head, where no files of sentence-transformers say how it makes vectors."""
    for number, case in enumerate(("qwen3", "qwen3")):
        directory = shutil.copytree(FIXTURES / case, tmp_path / str(number))
        tensors = {name: tensor for name, tensor in case_tensors(case).items() if name != "lm_head.weight"}
        if number == 0:
            tensors = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no output head.*embed_tokens\.weight.*embedding model.*modules\.json"):
        load_model(tmp_path / "0")
    with pytest.raises(ModelLoadError, match=r"no output head: it has no lm_head\.weight.*embedding model"):
        load_model(tmp_path / "1")


def test_every_case_reads_its_rope_scaling():
    kinds = {case: hf_config(case_config(case)).rope_scaling for case in CASES}
    assert kinds["mistral"] == RopeScaling("linear", 2.0, 131072)
    assert kinds["llama"] == RopeScaling("llama3", 8.0, 16, 1.0, 4.0)
    assert kinds["qwen3_yarn"] == RopeScaling("yarn", 4.0, 32)
    assert kinds["gemma3"] == RopeScaling("linear", 8.0, 131072)
    assert (kinds["phi3_long"].kind, kinds["phi3_long"].original_max_position) == ("longrope", 16)
    stated = {case for case, scaling in kinds.items() if scaling is not None}
    older = {"llama", "llama_biases", "mistral", "qwen3_yarn"}
    assert stated == older | {"phi3_short", "phi3_long", "gemma3", "olmo3", "gpt_oss"}
