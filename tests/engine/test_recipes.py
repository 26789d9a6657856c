"""Requests whose layers are kept in different KV formats, by a recipe: beside others, and when memory is short.

That each layer reads what its format makes of keys and values is tested in `tests/runner/test_step_invariance.py`.
"""

import numpy as np
import pytest
from engine_cases import random_model, serve

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.page_shapes import bits_per_value, bytes_per_token
from fineserve_jax.engine.perplexity import measure_perplexity
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.usage import count_events, measure_usage
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams

TEXT = "int8, first and last layer bf16"
NAMES = ["edges", "int8", "bf16"]
LONG = SamplingParams(max_tokens=100, ignore_eos=True, temperature=1.0, seed=3)
SHORT = LONG.model_copy(update={"max_tokens": 12})
PREFIX = np.random.default_rng(0).integers(1, 96, 40).tolist()
PROMPTS = [PREFIX + np.random.default_rng(i).integers(1, 96, 3 + i).tolist() for i in range(6)]
# One size for all engines: programs are compiled for an arena's size.
SIZES = {"max_seq_len": 160, "max_batch_size": 8, "max_chunk_tokens": 64, "kv_memory": "260KB"}


@pytest.fixture(scope="module")
def model():
    return random_model(num_layers=3)


@pytest.fixture(scope="module")
def make(model):
    """Engines that serve int8, bf16 and a recipe of both, and share their programs."""

    def make_engine(**settings) -> Engine:
        served = {"kv_formats": ("int8", "bf16"), "kv_precision": "int8", "kv_recipes": {"edges": TEXT}}
        engine = Engine(model, EngineConfig(**(SIZES | served | settings)))
        engine.runner.use_formats(["int8", "bf16"])
        engine.runner.use_narrowing()
        return engine

    return make_engine


@pytest.fixture(scope="module")
def alone(make):
    """By prompt and KV precision the tokens of a request that shares nothing with any other."""
    engine = make(prefix_cache="off")
    rows = [(i, name) for i in range(len(PROMPTS)) for name in NAMES]
    served = {row: serve(engine, [PROMPTS[row[0]]], [row[1]], LONG)[0] for row in rows}
    assert engine.stats().num_preemptions == engine.kv.num_narrowed_pages == 0
    return {row: request.output_token_ids for row, request in served.items()}


def test_a_token_takes_just_what_its_layers_formats_take(make):
    engine = make()
    geometry = engine.served().geometry
    words = {name: get_format(name).words_per_layer(geometry) for name in ("int8", "bf16")}
    own = engine.kv.class_of("tiny", "edges")
    assert [group.kv_format for group in own.groups] == ["bf16", "int8"]
    assert own.bytes_of_groups == 2 * (words["int8"] + 2 * words["bf16"])
    units = {name: get_format(name).units_per_layer(geometry) for name in words}
    token_bytes = 2 * geometry.unit_words * (units["int8"] + 2 * units["bf16"]) / geometry.page_size
    assert bytes_per_token(own, geometry) == token_bytes
    bits = {name: get_format(name).bits_per_value(geometry) for name in words}
    assert bits_per_value(own, geometry) == pytest.approx((bits["int8"] + 2 * bits["bf16"]) / 3)
    for name in words:
        assert bits_per_value(engine.kv.class_of("tiny", name), geometry) == bits[name]
    found = measure_perplexity(engine, PREFIX, window=32, windows=1, kv_precision="edges")
    assert (found.kv_precision, found.bits_per_value) == ("edges", bits_per_value(own, geometry))
    (request,) = serve(engine, [PREFIX[:32]], ["edges"], SamplingParams(max_tokens=1))
    assert request.kv_tokens == {"edges": 32}


def test_usage_counts_the_layers_of_both_formats(make):
    engine = make(prefix_cache="off")
    request = engine.add_request(PREFIX[:33], LONG, RequestOptions(kv_precision="edges"))
    engine.step()
    own, geometry = engine.kv.class_of("tiny", "edges"), engine.served().geometry
    usage = measure_usage(engine.kv).formats
    needed = [-(-33 * group.page_bytes // geometry.page_size) for group in own.groups]
    assert usage["edges"].needed_bytes == sum(needed)
    assert usage["edges"].cached_tokens == 33
    assert usage["int8"].owned_pages == usage["bf16"].owned_pages == 0
    engine.abort(request)
    engine.release(request)


def test_all_precisions_share_a_batch_and_each_its_own_prefix(make, alone):
    engine = make()
    rows = [(i, name) for i in range(2) for name in NAMES]
    found = serve(engine, [PROMPTS[i] for i, _ in rows], [name for _, name in rows], SHORT)
    assert engine.stats().num_preemptions == 0
    for row, request in zip(rows, found, strict=True):
        assert request.output_token_ids == alone[row][:12], row
    # Two pages of the prefix are computed once in each precision, and in none for another.
    computed = sum(len(PROMPTS[i]) for i, _ in rows) - len(NAMES) * 32
    assert engine.stats().num_prompt_tokens == computed
    assert count_events(engine.kv).hit_tokens == len(NAMES) * 32


@pytest.mark.slow
def test_a_wider_precision_serves_one_by_layer_and_none_that_is_wider_anywhere(make):
    engine = make(prefix_cache="convert")
    for name, converted in (("bf16", 0), ("edges", 4), ("int8", 8)):  # two pages in each of two layer groups
        serve(engine, [PROMPTS[0]], [name], SHORT)
        assert count_events(engine.kv).converted_pages == converted
    other = make(prefix_cache="convert")
    serve(other, [PROMPTS[0]], ["int8"], SHORT)
    serve(other, [PROMPTS[0]], ["edges"], SHORT)
    assert count_events(other.kv).converted_pages == 0


@pytest.mark.parametrize("preemption", ["swap", pytest.param("recompute", marks=pytest.mark.slow)])
def test_short_memory_changes_no_tokens(make, alone, preemption):
    engine = make(preemption=preemption)
    found = serve(engine, PROMPTS, ["edges", "int8"] * 3, LONG)
    assert engine.stats().num_preemptions > 0
    assert (count_events(engine.kv).saved_requests > 0) == (preemption == "swap")
    for i, request in enumerate(found):
        assert request.output_token_ids == alone[i, request.kv_precision], i


@pytest.mark.parametrize(("start", "floor"), [("bf16", "edges"), ("edges", "int8"), ("auto", None)])
def test_older_tokens_are_narrowed_to_a_recipe_and_from_one(make, alone, start, floor):
    """Layers that are alike in both formats stay as they are."""
    engine = make()
    fixed = RequestOptions(kv_precision="edges")
    options = RequestOptions(kv_precision=start, min_kv_precision=floor)
    requests = [engine.add_request(prompt, LONG, fixed if i == 1 else options) for i, prompt in enumerate(PROMPTS)]
    while engine.has_unfinished:
        engine.step()
    assert engine.kv.num_narrowed_pages > 0
    assert requests[1].output_token_ids == alone[1, "edges"]
    assert set(requests[1].kv_tokens) == {"edges"}
    kept = {name for i, request in enumerate(requests) if i != 1 for name in request.kv_tokens}
    assert kept == ({"bf16", "int8"} if start == "auto" else {start, floor})
    assert all(sum(request.kv_tokens.values()) == request.num_tokens - 1 for request in requests)


def test_what_cannot_be_honoured_is_refused(make):
    with pytest.raises(ConfigError, match="model 'tiny': recipe 'int8, layer 3 bf16' names layer 3; there are 3"):
        make(kv_recipes={"edges": "int8, layer 3 bf16"})
    engine = make()
    with pytest.raises(RequestError, match="min_kv_precision='edges' is wider than kv_precision='int8'"):
        engine.add_request(PREFIX, SHORT, RequestOptions(kv_precision="int8", min_kv_precision="edges"))
    with pytest.raises(RequestError, match="'middle' is not served; choose one of int8, bf16, edges, auto"):
        engine.add_request(PREFIX, SHORT, RequestOptions(kv_precision="middle"))


def with_windows():
    return random_model(num_layers=4, sliding_window=20, full_attention_layers=(0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"reproducible": True, "kv_precision": "edges"}], ids=["", "reproducible"])
def test_windows_divide_layers_further(settings):
    served = {
        "kv_formats": ("int4", "bf16"),
        "kv_precision": "int4",
        "kv_recipes": {"edges": "int4, first and last layer bf16"},
    }
    tokens, names = [], ["edges", "int4", "bf16"]
    for more in ({}, {"prefix_cache": "off", "max_chunk_tokens": 64 if settings else 16}):
        engine = Engine(with_windows(), EngineConfig(**(SIZES | served | settings | more)))
        assert [(own.kv_format, own.window) for own in engine.kv.class_of("tiny", "edges").groups] == [
            ("bf16", None),
            ("int4", None),
            ("int4", 20),
            ("bf16", 20),
        ]
        if more:
            found = [serve(engine, [prompt], [name], SHORT)[0] for prompt in PROMPTS[:3] for name in names]
        else:
            found = serve(engine, [prompt for prompt in PROMPTS[:3] for _ in names], names * 3, SHORT)
        tokens.append([request.output_token_ids for request in found])
    assert tokens[0] == tokens[1]
