"""Several models in one engine: one memory for all, and each says what it says alone."""

import itertools

import numpy as np
import pytest
from engine_cases import random_model, serve

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.model_settings import ModelSettings
from fineserve_jax.engine.page_shapes import page_geometries, page_geometry
from fineserve_jax.engine.perplexity import measure_perplexity
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.pallas_kernels.formats import FORMATS
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.model_choice import MOST_TURNS_LEFT_OUT

# Different in every length that a page has, in weights, and in vocabulary; "flat" alone has shorter units.
MODELS = {
    "tall": random_model(num_layers=3, num_kv_heads=1),
    "flat": random_model(weights="int8", num_heads=6, num_kv_heads=3, head_dim=16, vocab_size=90, max_position=300),
}
NAMES = ["tall", "flat"] * len(FORMATS)
KV_FORMATS = [name for name in FORMATS for _ in MODELS]
OPTIONS = {"max_seq_len": 128, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "256KB"}
SAMPLINGS = {
    "greedy": SamplingParams(max_tokens=60, ignore_eos=True),
    "sampled": SamplingParams(max_tokens=60, ignore_eos=True, temperature=1.0, top_p=0.9, seed=3),
}


def make_engine(models=MODELS, settings=None, **options) -> Engine:
    engine = Engine(models, EngineConfig(**(OPTIONS | options)), settings=settings)
    for served in engine.models.values():
        served.runner.use_formats(engine.config.served_formats)  # so that tests share compiled programs
    return engine


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(1, 90, rng.integers(1, 60)).tolist() for _ in NAMES]


@pytest.fixture(scope="module")
def alone(prompts) -> dict[str, list[list[int]]]:
    """What each request gets from its model in an engine of its own, by kind of sampling."""
    engines = {name: make_engine(model) for name, model in MODELS.items()}
    return {
        kind: [
            serve(engines[name], [prompt], [kv_format], sampling)[0].output_token_ids
            for name, prompt, kv_format in zip(NAMES, prompts, KV_FORMATS, strict=True)
        ]
        for kind, sampling in SAMPLINGS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", SAMPLINGS)
@pytest.mark.parametrize("policy", ["elastic", "uniform"])
def test_each_model_says_what_it_says_alone_although_they_take_memory_from_each_other(prompts, alone, kind, policy):
    engine = make_engine(slab_policy=policy, kv_memory="200KB")
    together = serve(engine, prompts, KV_FORMATS, SAMPLINGS[kind], NAMES)
    assert any(request.num_preemptions for request in together), "the memory was meant to be too small"
    assert [request.output_token_ids for request in together] == alone[kind]


def test_models_of_one_shape_share_compiled_programs_and_no_pages():
    models = {"a": MODELS["tall"], "b": MODELS["tall"]}
    engine = make_engine(models)
    sampling = SamplingParams(max_tokens=20, ignore_eos=True)
    requests = [
        engine.add_request([1, 2, 3], sampling, RequestOptions(kv_precision="bf16", model=name)) for name in models
    ]
    while not requests[-1].num_output_tokens:
        engine.step()
    first, second = (engine.stats().models[name] for name in models)
    assert first.kv["bf16"].owned_pages == second.kv["bf16"].owned_pages == 1
    while engine.has_unfinished:
        engine.step()
    assert requests[0].output_token_ids == requests[1].output_token_ids
    assert engine.models["b"].runner.num_compilations == 0


def test_no_model_is_left_out_for_long():
    engine = make_engine()
    for name in MODELS:
        for token in (1, 2):
            engine.add_request([token] * 20, SamplingParams(max_tokens=10, ignore_eos=True), RequestOptions(model=name))
    advanced = []
    while engine.has_unfinished:
        advanced += {request.model for request in engine.step()}
    runs = [len(list(steps)) for _, steps in itertools.groupby(advanced)]
    assert len(runs) > 2
    assert max(runs[:-1]) <= MOST_TURNS_LEFT_OUT + 1


def test_units_are_as_long_as_the_shortest_of_the_models():
    alone = [page_geometry(model.config, 32).unit_words for model in MODELS.values()]
    assert len(set(alone)) > 1
    assert {geometry.unit_words for geometry in page_geometries(MODELS, 32).values()} == {min(alone)}
    assert {geometry.unit_words for geometry in page_geometries(MODELS, 32, tpu=True).values()} == {1024}


def test_stats_say_what_each_model_holds():
    engine = make_engine()
    engine.add_request([1] * 20, SamplingParams(max_tokens=10), RequestOptions(kv_precision="int8", model="flat"))
    engine.step()
    stats = engine.stats()
    assert {name: model.weights for name, model in stats.models.items()} == {"tall": "fp32", "flat": "int8"}
    assert set(stats.models["flat"].kv) == set(engine.models["flat"].formats)
    assert stats.models["flat"].kv["int8"].owned_pages == stats.kv["int8"].owned_pages == 2
    assert stats.models["flat"].kv["int8"].reserved_bytes == stats.kv["int8"].reserved_bytes > 0
    assert not any(part.owned_pages for part in stats.models["tall"].kv.values())
    assert stats.kv_bytes == engine.arena.nbytes <= 256_000


def test_perplexity_is_of_the_model_that_is_named():
    engine, tokens = make_engine(), list(range(1, 33))
    of_each = [measure_perplexity(engine, tokens, 32, 1, "fp32", model=name) for name in MODELS]
    assert [(result.model, result.weights) for result in of_each] == [("tall", "fp32"), ("flat", "int8")]
    for result in of_each:
        assert result.ppl == measure_perplexity(make_engine(MODELS[result.model]), tokens, 32, 1, "fp32").ppl
    with pytest.raises(RequestError, match="give model as one of tall, flat"):
        measure_perplexity(engine, tokens, 32, 1)
    check_integrity(engine.kv)


def test_a_prediction_is_learnt_for_each_model():
    engine = make_engine()
    sampling = SamplingParams(max_tokens=30, ignore_eos=True)
    serve(engine, [[1]], ["bf16"], sampling, ["flat"])
    serve(engine, [[1]], ["bf16"], sampling, ["flat"])  # nothing compiles any more
    stats = engine.stats()
    assert stats.models["tall"].prediction_error is None
    assert stats.models["flat"].prediction_error == stats.prediction_error is not None


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([1], {}, "no model is named, and there are several; give model as one of tall, flat"),
        ([1], {"model": "round"}, "model='round' is not served; choose one of tall, flat"),
        ([92], {"model": "flat"}, "token 92; flat has tokens 0 to 89"),
        ([1] * 64, {"model": "flat"}, "64 tokens; with max_seq_len=64 it may have 63"),
        ([1], {"model": "tall", "kv_precision": "int5"}, "kv_precision='int5' is not served; choose one of fp32"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused(prompt, options, message):
    engine = make_engine(settings={"flat": ModelSettings(max_seq_len=64)})
    with pytest.raises(RequestError, match=message):
        engine.add_request(prompt, None, RequestOptions(**options))
    assert not engine.has_unfinished


def test_a_model_may_have_its_own_precision_and_length():
    engine = make_engine(settings={"flat": ModelSettings(kv_precision="int4", max_seq_len=64)})
    sampling = SamplingParams(ignore_eos=True)
    long, short = (engine.add_request([1] * 40, sampling, RequestOptions(model=name)) for name in MODELS)
    assert (long.kv_precision, long.max_total_tokens) == ("bf16", 128)
    assert (short.kv_precision, short.max_total_tokens) == ("int4", 64)
    assert engine.add_request([92], sampling, RequestOptions(model="tall")).token_ids == [92]


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"round": ModelSettings()}, {}, "settings are for the model 'round'; the models are: tall, flat"),
        ({}, {"max_seq_len": 400}, "max_seq_len=400 is more than the 300 tokens that flat can attend to here"),
        ({"flat": ModelSettings(kv_precision="int4")}, {"kv_formats": ["bf16"]}, "'int4' is not among kv_formats"),
        ({}, {"kv_memory": "20KB"}, "kv_memory=19.5 KiB is too small for one request: a page alone takes up to"),
        (
            {"flat": ModelSettings(kv_precision="fp32", max_seq_len=300)},
            {"kv_memory": "200KB", "max_seq_len": 64},
            "kv_memory=.* too small for one request: it holds .* tokens in fp32 of flat, max_seq_len is 300",
        ),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(settings, options, message):
    with pytest.raises(ConfigError, match=message):
        make_engine(settings=settings, **options)


def test_an_engine_of_no_model_is_refused():
    with pytest.raises(ConfigError, match="no model; give at least one"):
        make_engine({})


def test_what_belongs_to_the_only_model_is_refused_when_there_are_several():
    engine = make_engine()
    for attribute in ("model", "tokenizer", "runner", "max_seq_len"):
        with pytest.raises(RequestError, match="there are several"):
            getattr(engine, attribute)
