"""`--model`, once or repeated, and what a settings file says of models."""

from pathlib import Path

import pytest

from fineserve_jax import ConfigError
from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.entrypoints.cli.model_flags import choose_model, choose_models, models_of_file
from fineserve_jax.entrypoints.cli.options import settle

FILE = Path("settings.yaml")
TWO = models_of_file(FILE, {"models": {"a": "x.gguf", "b": {"model": "y", "weights": "int8", "kv_precision": "int4"}}})
DEFAULT = ModelSource(model="smollm2-135m")


def test_one_model_needs_no_name():
    assert choose_model(None, DEFAULT) == choose_models([], DEFAULT) == DEFAULT
    for flag in ("x.gguf", "/dir=1/x:int8", "C:int8"):
        assert choose_model(flag, DEFAULT) == choose_models([flag], DEFAULT) == ModelSource(model=flag)


@pytest.mark.parametrize(
    ("flag", "source"),
    [
        ("a=x.gguf", ModelSource(model="x.gguf")),
        ("a=x.gguf:int4", ModelSource(model="x.gguf", weights="int4")),
        ("a=/dir=1/x:y", ModelSource(model="/dir=1/x:y")),
        ("a=x:1:bf16", ModelSource(model="x:1", weights="bf16")),
    ],
)
def test_a_flag_may_name_its_model_and_say_the_precision_of_its_weights(flag, source):
    assert choose_models([flag], DEFAULT) == {"a": source}
    assert choose_models([flag, "b=y"], TWO) == {"a": source, "b": ModelSource(model="y")}


def test_flags_choose_among_the_models_of_the_file_and_replace_them():
    assert choose_models([], TWO) == TWO
    assert choose_models(["b"], TWO) == {"b": TWO["b"]}
    assert choose_models(["b", "c=z"], TWO) == {"b": TWO["b"], "c": ModelSource(model="z")}
    assert choose_model("b", TWO) == TWO["b"]
    assert choose_model("z", TWO) == choose_models(["z"], TWO) == ModelSource(model="z")
    assert choose_model(None, {"a": TWO["a"]}) == TWO["a"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["x", "b=y"], "--model x is one of several and has no name; write --model NAME=x"),
        (["b=x", "b=y"], "two models are called 'b'; give each --model a name of its own"),
    ],
)
def test_flags_that_leave_doubt_are_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        choose_models(flags, DEFAULT)


def test_a_command_for_one_model_asks_which():
    with pytest.raises(ConfigError, match="takes one; give --model with one of a, b"):
        choose_model(None, TWO)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "x", "models": {"a": "x"}}, "settings.yaml sets both `model` and `models`; keep one"),
        ({"models": ["x"]}, r"settings.yaml: models=\['x'\] names no model"),
        ({"models": {"a": {"model": "x", "weight": "int8"}}}, "settings.yaml: model 'a': unknown setting 'weight'"),
    ],
)
def test_a_file_that_is_wrong_about_models_is_refused_by_name(settings, message):
    with pytest.raises(ConfigError, match=message):
        models_of_file(FILE, settings)


def test_what_is_special_about_the_one_model_of_a_command_beats_the_file_and_not_the_flags(tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text("kv_precision: bf16\nmodels:\n  a: x\n  b: {model: y, kv_precision: int8, weights: int4}\n")
    settings = settle(path, "b", {"weights": "fp32"})
    assert (settings.model, settings.models) == ("y", {})
    assert settings.engine == {"kv_precision": "int8", "weights": "fp32"}
    several = settle(path, (), {"weights": "fp32"})
    assert (several.model, list(several.models)) == ("", ["a", "b"])
    assert several.engine == {"kv_precision": "bf16", "weights": "fp32"}
