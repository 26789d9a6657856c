"""The synchronous front door with several models, which prompts name."""

from pathlib import Path

import pytest
from engine_cases import random_model

from fineserve_jax.engine import load as load_engine
from fineserve_jax.engine import model_settings
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.request.sampling_params import SamplingParams

TEN = SamplingParams(max_tokens=10, ignore_eos=True)
OPTIONS = {"max_seq_len": 64, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "4MiB", "kv_precision": "int8"}
MODELS = {"exact": "tiny", "fast": {"model": Path("tiny"), "weights": "int8", "max_seq_len": 48}}


@pytest.fixture(autouse=True)
def loads(monkeypatch) -> list[tuple[str, str | None]]:
    """What was loaded, as (source, weights)."""
    loads = []

    def load(source, weights, placement):
        loads.append((source, weights))
        return random_model("from a file", weights or "fp32")

    for module in (load_engine, model_settings):
        monkeypatch.setattr(module, "load_model", load)
    monkeypatch.setattr(model_settings, "resolve_source", Path)
    return loads


def make_llm(**arguments) -> LLM:
    llm = LLM(**OPTIONS | arguments)
    for served in llm.engine.models.values():
        served.runner.use_formats(["int8", "bf16"])  # so that tests share compiled programs
    return llm


@pytest.fixture
def llm() -> LLM:
    return make_llm(models=MODELS)


def test_each_prompt_is_answered_by_the_model_it_names(llm):
    prompts = ["abc", "hello"] * 2
    names = ["exact", "exact", "fast", "fast"]
    outputs = llm.generate(prompts, TEN, model=names)
    assert [output.model for output in outputs] == names
    texts = [output.outputs[0].text for output in outputs]
    assert texts[:2] != texts[2:]
    assert texts[2:] == [output.outputs[0].text for output in llm.generate(prompts[:2], TEN, model="fast")]
    for prompt, name, text in zip(prompts, names, texts, strict=True):
        assert "".join(llm.stream(prompt, TEN, model=name)) == text
    assert llm.stats().num_running == llm.stats().num_waiting == 0


def test_every_model_is_warmed_up(llm):
    llm.warm_up(["bf16"])
    before = llm.stats().num_compilations
    llm.generate(["a", "b" * 40] * 2, TEN, model=["exact", "fast", "fast", "exact"], kv_precision=["bf16", None] * 2)
    assert llm.stats().num_compilations == before


def test_a_prompt_that_names_no_model_is_refused_and_so_is_one_too_long_for_its_model(llm):
    for ask in (llm.generate, llm.stream):
        with pytest.raises(RequestError, match="give model as one of exact, fast"):
            ask("abc", TEN)
        with pytest.raises(RequestError, match="model='quick' is not served; choose one of exact, fast"):
            ask("abc", TEN, model="quick")
    with pytest.raises(RequestError, match="model has 1 entries for 2 prompts"):
        llm.generate(["a", "b"], TEN, model=["fast"])
    with pytest.raises(RequestError, match="prompt 1: the prompt has 50 tokens; with max_seq_len=48"):
        llm.generate(["a" * 50] * 2, TEN, model=["exact", "fast"])
    assert llm.stats().num_steps == 0


def test_a_single_model_may_be_named(loads):
    llm = make_llm(model="tiny")
    assert llm.engine.model.name == "from a file"
    (named,), (unnamed,) = llm.generate("abc", TEN, model="from a file"), llm.generate("abc", TEN)
    assert named.outputs[0].text == unnamed.outputs[0].text
    assert LLM(models={"only": "tiny"}, **OPTIONS).engine.tokenizer.encode("a") == llm.tokenizer.encode("a")


def test_models_of_one_file_in_one_precision_share_their_weights(loads):
    models = {"a": "tiny", "b": {"model": "tiny", "kv_precision": "int4"}, "c": {"model": "tiny", "weights": "bf16"}}
    engine = LLM(models=models, **OPTIONS).engine
    assert loads == [("tiny", None), ("tiny", "bf16")]
    assert engine.models["a"].model.params is engine.models["b"].model.params
    assert {name: served.config.kv_precision for name, served in engine.models.items()} == {
        "a": "int8",
        "b": "int4",
        "c": "int8",
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "neither model nor models; give one model, or several by name"),
        ({"model": "tiny", "models": MODELS}, "both model and models"),
        ({"models": {}}, "names no model"),
        ({"models": ["tiny"]}, r"models=\['tiny'\] names no model; give names with a path"),
        ({"models": {" ": "tiny"}}, "a model is called ' '"),
        ({"models": {1: "tiny"}}, "a model is called 1"),
        ({"models": {"a": 1}}, "model 'a' is 1; give an alias or a path, or a table"),
        ({"models": {"a": {"weights": "int8"}}}, "model 'a': model=.*: field required"),
        ({"models": {"a": {"model": "x", "kv_memory": 1}}}, "model 'a': unknown setting 'kv_memory'; the settings are"),
        ({"models": {"a": {"model": "x", "weights": "int2"}}}, "model 'a': weights='int2'"),
        ({"models": {"a": {"model": "x", "kv_precision": "int5"}}}, "model 'a': kv_precision='int5': unknown KV"),
        ({"models": {"a": {"model": "x", "max_seq_len": 1}}}, "model 'a': max_seq_len=1"),
        (
            {"models": {"a": {"model": "x", "kv_precision": "bf16"}}, "kv_formats": ["int8"]},
            "model 'a': kv_precision='bf16' is not among kv_formats",
        ),
    ],
)
def test_models_that_make_no_sense_are_refused_before_any_is_loaded(loads, arguments, message):
    with pytest.raises(ConfigError, match=message):
        LLM(**OPTIONS | arguments)
    assert loads == []
