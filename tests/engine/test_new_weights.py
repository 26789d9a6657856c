"""New weights in the place of others, and memory that is given back, between two steps and without compiling."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import random_model
from model_oracle import FIXTURES, case_tensors

from fineserve_jax.engine import load as load_engine
from fineserve_jax.engine import new_weights
from fineserve_jax.engine.new_weights import new_params
from fineserve_jax.errors import ConfigError, EngineError, ModelLoadError
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.llm import LLM
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.loaders.hf_model import HFModel
from fineserve_jax.models import pack_params, random_params
from fineserve_jax.request.sampling_params import SamplingParams

GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = ["a" * 40, "The sky is", "b"]
WEIGHTS = ("fp32", "bf16", "int8", "int4")


def params_of(model: LoadedModel, seed: int, weights: str = "fp32"):
    return random_params(model.config, weights, seed=seed, scale=0.2)


def texts(llm: LLM) -> list[str]:
    return [output.outputs[0].text for output in llm.generate(PROMPTS, GREEDY)]


def assert_equal_trees(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def make_llm(monkeypatch):
    monkeypatch.setattr(load_engine, "use_compilation_cache", lambda: None)

    def make(seed: int = 7) -> LLM:
        model = random_model()
        model = dataclasses.replace(model, params=params_of(model, seed))  # a table of its own
        monkeypatch.setattr(load_engine, "load_model", lambda *_: model)
        sizes = {"max_seq_len": 256, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "8MiB"}
        return LLM("tiny", kv_precision="fp32", kv_formats=("fp32",), **sizes)

    return make


# -- from where weights come ---------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_trainers_tree_is_encoded_as_a_checkpoint_is(weights, tied):
    model = random_model(weights=weights, tie_embeddings=tied, intermediate_size=128)
    expected = params_of(model, 3, weights)
    assert_equal_trees(new_params(model, params_of(model, 3)), expected)
    assert_equal_trees(new_params(model, expected), expected)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of(model, 3))
    assert jax.tree.structure(new_params(model, narrow)) == jax.tree.structure(expected)


@pytest.mark.parametrize("weights", ["fp32", "int8"])
@pytest.mark.parametrize("case", ["smollm2", "gemma3", "gpt_oss", "qwen3_moe"])
def test_tensors_by_name_are_read_as_a_checkpoint_is(case, weights):
    """Norms of 1 + weight, stacks of experts and joined projections are those of the family."""
    source = HFModel(FIXTURES / case)
    try:
        expected = pack_params(source.config, weights, source)
    except ModelLoadError:
        pytest.skip("widths that the format cannot store")
    model = LoadedModel(case, source.config, expected, None, weights)
    assert_equal_trees(new_params(model, case_tensors(case)), expected)


def test_a_tree_of_experts_is_encoded_expert_by_expert():
    source = HFModel(FIXTURES / "qwen3_moe")
    wide, packed = (pack_params(source.config, weights, source) for weights in ("fp32", "int8"))
    assert_equal_trees(new_params(LoadedModel("m", source.config, packed, None, "int8"), wide), packed)


def test_weights_that_are_not_the_models_are_refused(monkeypatch):
    model = random_model(weights="int8")
    tree = params_of(model, 3)
    with pytest.raises(ModelLoadError, match="the tree lacks 'norm/scale'"):
        new_params(model, {name: part for name, part in tree.items() if name != "norm"})
    with pytest.raises(ModelLoadError, match="the tree has, beside what the model has, 'other/scale'"):
        new_params(model, {**tree, "other": tree["norm"]})
    with pytest.raises(ModelLoadError, match=r"'norm/scale' is float32\[3\]; floats of shape \[64\] are wanted"):
        new_params(model, {**tree, "norm": {"scale": np.zeros(3, np.float32)}})
    with pytest.raises(ModelLoadError, match=r"the checkpoint lacks \d+ of"):
        new_params(model, {"model.norm.weight": np.zeros(64, np.float32)})
    other = random_model(rope_theta=5e5)
    monkeypatch.setattr(new_weights, "load_model", lambda *_: other)
    with pytest.raises(ConfigError, match=r"with rope_theta=500000\.0, 'tiny' has rope_theta=10000\.0"):
        new_params(model, "elsewhere")
    tensors = case_tensors("smollm2")
    source = HFModel(FIXTURES / "smollm2")
    tied = LoadedModel("smollm2", source.config, {}, None, "fp32")
    assert source.config.tie_embeddings
    embedding = tensors["model.embed_tokens.weight"]
    new_params(tied, {**tensors, "lm_head.weight": embedding})
    with pytest.raises(ModelLoadError, match=r"1 tensors that nothing here uses, among them lm_head\.weight"):
        new_params(tied, {**tensors, "lm_head.weight": embedding + 1})


# -- in the place of others ----------------------------------------------------------------------------------


def test_what_is_said_from_then_on_is_the_new_models_and_nothing_is_compiled(make_llm):
    llm, other = make_llm(), make_llm(seed=8)
    old, new = texts(llm), texts(other)
    assert old != new
    before, source = llm.stats().num_compilations, params_of(llm.engine.model, 8)
    llm.update_params(source)
    jax.tree.map(lambda leaf: leaf.delete(), source)  # it was copied
    assert measure_usage(llm.engine.kv).cached_tokens == 0
    assert texts(llm) == new  # though prompts are those whose pages were cached
    llm.update_params(params_of(llm.engine.model, 7))
    assert texts(llm) == old
    assert llm.stats().num_compilations == before
    with pytest.raises(ModelLoadError):
        llm.update_params({"norm": {}})
    assert texts(llm) == old


@pytest.mark.parametrize("abort", [False, True])
def test_requests_that_are_under_way_are_answered_by_the_old_weights_or_aborted(make_llm, abort):
    llm, sampling = make_llm(), SamplingParams(max_tokens=200, ignore_eos=True)
    (whole,), begun, answers = llm.generate("a" * 40, sampling), threading.Event(), []

    def generate():
        stream = llm.stream("a" * 40, sampling)
        answers.append(next(stream))
        begun.set()
        answers[0] += "".join(stream)

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait()
    llm.update_params(params_of(llm.engine.model, 8), abort=abort)
    thread.join()
    expected = whole.outputs[0].text
    assert answers[0] == expected[: len(answers[0])]
    assert (len(answers[0]) < len(expected)) == abort
    assert texts(llm) == texts(make_llm(seed=8))


def test_requests_that_come_meanwhile_are_answered_by_the_new_weights(make_llm, monkeypatch):
    llm, is_draining = make_llm(), threading.Event()
    expected, drain = texts(make_llm(seed=8)), llm.loop._drain
    monkeypatch.setattr(llm.loop, "_drain", lambda abort: (is_draining.set(), drain(abort)))
    stream = llm.stream("a" * 40, SamplingParams(max_tokens=200, ignore_eos=True))
    next(stream)
    thread = threading.Thread(target=llm.update_params, args=[params_of(llm.engine.model, 8)])
    thread.start()
    is_draining.wait()
    assert texts(llm) == expected
    assert len("".join(stream)) > 150
    thread.join()


def test_an_engine_with_unfinished_requests_is_left_alone(make_llm):
    engine = make_llm().engine
    request = engine.add_request([5] * 20, GREEDY)
    with pytest.raises(EngineError, match="update_params while 1 requests are unfinished"):
        engine.update_params(params_of(engine.model, 8))
    with pytest.raises(EngineError, match="sleep while 1 requests are unfinished"):
        engine.sleep()
    engine.abort(request)
    engine.update_params(params_of(engine.model, 8))


# -- memory that is given back -------------------------------------------------------------------------------


@pytest.mark.parametrize("drop_weights", [False, True])
def test_an_engine_that_slept_says_what_it_said(make_llm, drop_weights):
    llm = make_llm()
    old, weights = texts(llm), params_of(llm.engine.model, 7)
    arena, before = llm.engine.arena.units, llm.stats().num_compilations
    llm.sleep(drop_weights=drop_weights)
    assert arena.is_deleted()
    assert llm.engine.model.params == {} or not drop_weights
    llm.sleep()
    with pytest.raises(EngineError, match="the engine is asleep; wake_up gives it its memory back"):
        llm.generate("a")
    with pytest.raises(EngineError, match="asleep"):
        llm.warm_up()
    if drop_weights:
        with pytest.raises(EngineError, match="the weights of 'tiny' were dropped; give others by update_params"):
            llm.wake_up()
        llm.update_params(weights)
    llm.wake_up()
    llm.wake_up()
    assert texts(llm) == old
    assert llm.stats().num_compilations == before
