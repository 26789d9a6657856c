"""Engines over 2, 4 and 8 devices, which are parts of one CPU. `test_tensor_parallel.py` runs this file by itself, in a
process that has 8: JAX is told of them before it starts.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from engine_cases import random_model, serve
from test_family_tokens import assert_as_expected, assert_prompt_as_expected, loaded, make_engine

from fineserve_jax.engine.embedding import Embedding
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.page_shapes import page_classes
from fineserve_jax.engine.scoring import Scoring
from fineserve_jax.engine.tickets import Inbox
from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.operations import Copy, HostPages, Load, Save
from fineserve_jax.kv.usage import count_events
from fineserve_jax.loaders import load_model
from fineserve_jax.models import random_params
from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.mesh import device_group
from fineserve_jax.runner.page_operations import PageOperations

FORMATS = ("fp32", "bf16", "int8", "int4")
PROMPTS = [np.random.default_rng(i).integers(1, 96, length).tolist() for i, length in enumerate((50, 37, 61, 45))]
NEAR_TIE = {"fp32": 0.001, "bf16": 0.02, "int8": 0.1, "int4": 0.3}  # as in the tests against transformers
SHAPE = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 32, "intermediate_size": 128, "vocab_size": 96}
MEMORY = 1_000_000  # of all devices together, so that the books of all engines are about the same


@functools.cache
def model(weights: str = "fp32", **shape):
    return random_model(weights=weights, **(SHAPE | shape))


@functools.cache
def engine_of(devices: int, preemption: str = "auto", weights: str = "fp32") -> Engine:
    """Engines of one number of devices share their programs."""
    config = EngineConfig(
        kv_formats=FORMATS,
        kv_precision="fp32",
        kv_memory=MEMORY // devices,
        max_seq_len=192,
        max_batch_size=8,
        max_chunk_tokens=32,
        preemption=preemption,
        tensor_parallel=devices,
    )
    engine = Engine(model(weights), config)
    engine.runner.use_formats(FORMATS)
    engine.runner.use_narrowing()
    return engine


def assert_alike(found, expected, near_tie=None) -> None:
    """The same tokens and log-probabilities, up to a near-tie."""
    for one, other in zip(found, expected, strict=True):
        limit = near_tie or NEAR_TIE[other.kv_precision]
        pairs = zip(one.output_token_ids, other.output_token_ids, strict=True)
        alike = next((i for i, (a, b) in enumerate(pairs) if a != b), len(other.output_token_ids))
        if alike < len(other.output_token_ids):
            first, second, *_ = sorted(other.logprobs[alike].top.values(), reverse=True)
            assert first - second <= limit, (other.kv_precision, alike)
        for a, b in zip(one.logprobs[:alike], other.logprobs[:alike], strict=True):
            assert abs(a.logprob - b.logprob) <= limit


@functools.cache
def expected(weights: str = "fp32"):
    return serve(engine_of(1, weights=weights), PROMPTS, list(FORMATS), GREEDY)


GREEDY = SamplingParams(max_tokens=40, ignore_eos=True, logprobs=2, prompt_logprobs=0)


@pytest.mark.parametrize("devices", [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))])
def test_tokens_of_all_formats_are_those_of_one_device(devices):
    """Chunks, decoding, pages of int4 that close on the way, and a prefix that is shared; with 8 devices each of the 4
    KV heads is on two."""
    engine = engine_of(devices)
    found = serve(engine, PROMPTS, list(FORMATS), GREEDY)
    assert_alike(found, expected())
    for one, other in zip(found, expected(), strict=True):
        ours, theirs = ([entry.logprob for entry in request.scores.entries] for request in (one, other))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=NEAR_TIE[other.kv_precision])
    before = count_events(engine.kv).hit_tokens
    again = serve(engine, PROMPTS, list(FORMATS), GREEDY.model_copy(update={"prompt_logprobs": None}))
    assert count_events(engine.kv).hit_tokens > before
    assert_alike(again, expected())


@pytest.mark.parametrize("devices", [2])
def test_sampling_draws_what_one_device_draws(devices):
    """Seeds, filters, penalties, biases and masks of structured outputs act on all of the vocabulary."""
    kinds = [
        {"temperature": 1.0, "seed": 3},
        {"temperature": 0.8, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "seed": 4},
        {"repetition_penalty": 1.2, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {95: 4.0, 50: -3.0}},
        {"structured_outputs": {"regex": "[a-f]{30}[x-z]{30}"}},
    ]
    served = []
    for count in (1, devices):
        engine = engine_of(count)
        params = [SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2, **kind) for kind in kinds]
        requests = [engine.add_request(PROMPTS[0], own, RequestOptions(kv_precision="fp32")) for own in params]
        while engine.has_unfinished:
            engine.step()
        served.append(requests)
    assert [r.output_token_ids for r in served[1]] == [r.output_token_ids for r in served[0]]


@pytest.mark.slow
def test_completions_are_scored_and_prompts_embedded_as_on_one_device():
    """The completions of a prompt as branches of one request."""
    served = []
    for count in (1, 2):
        engine, options = engine_of(count), RequestOptions(kv_precision="fp32")
        completions = [PROMPTS[1][:9], PROMPTS[2][:5], PROMPTS[3][:1]]
        tickets = Scoring(PROMPTS[:1], [completions], options, {}).tickets(engine, Inbox())
        tickets += Embedding(PROMPTS[1:2], "mean", False, options, {}).tickets(engine, Inbox())
        (scored,), (embedded,) = (engine.queue(ticket.prepared) for ticket in tickets)
        while engine.has_unfinished:
            engine.step()
        assert len(scored.branches) == 3
        served.append(([entry.logprob for entry in scored.scores.entries], embedded.pooling.total))
    (expected, sums), (found, total) = served
    np.testing.assert_allclose(found, expected, rtol=0, atol=NEAR_TIE["fp32"])
    np.testing.assert_allclose(total, sums, rtol=0, atol=NEAR_TIE["fp32"] * len(PROMPTS[1]))


@pytest.mark.parametrize("preemption", ["swap", pytest.param("recompute", marks=pytest.mark.slow)])
def test_memory_that_is_short_changes_no_tokens(preemption):
    """Pages are narrowed, moved, saved to host memory and loaded, on all devices alike."""
    engine = engine_of(2, preemption)
    kinds = [*FORMATS, "auto", "fp32", "auto", "fp32"]
    long = GREEDY.model_copy(update={"max_tokens": 100, "prompt_logprobs": None})
    alone = []
    for i, name in enumerate(kinds):
        if name != "auto":
            alone += serve(engine_of(1), [PROMPTS[i % 4][i:]], [name], long)
    requests = serve(engine, [PROMPTS[i % 4][i:] for i in range(len(kinds))], kinds, long)
    counts = count_events(engine.kv)
    assert counts.narrowed_pages > 0
    assert counts.moved_pages > 0
    assert engine.stats().num_preemptions > 0
    assert (counts.saved_requests > 0) == (preemption == "swap")
    assert_alike([r for r, name in zip(requests, kinds, strict=True) if name != "auto"], alone)


@pytest.mark.slow
def test_new_weights_and_sleep_reach_all_devices():
    two, one = engine_of(2), engine_of(1)
    before = [request.output_token_ids for request in expected()]
    others = random_params(model().config, "fp32", seed=8, scale=0.2)
    original = jax.tree.map(np.array, model().params)
    short = GREEDY.model_copy(update={"prompt_logprobs": None})
    for engine in (two, one):
        engine.update_params(others)
    found, wanted = (serve(engine, PROMPTS, list(FORMATS), short) for engine in (two, one))
    assert_alike(found, wanted)
    assert [request.output_token_ids for request in found] != before
    for engine in (two, one):
        engine.update_params(original)
    two.sleep()
    two.wake_up()
    assert_alike(serve(two, PROMPTS, list(FORMATS), short), expected())
    served = two.runner.params
    two.update_params(served)  # its own tree, as it is served
    assert_alike(serve(two, PROMPTS[:1], ["fp32"], short), expected()[:1])


def test_what_is_said_of_memory_is_of_each_device():
    """Half of the KV heads: half of the bytes, of a token and of all."""
    one, two, eight = (engine_of(devices) for devices in (1, 2, 8))  # which compile nothing for it
    assert two.arena.units.nbytes == 2 * two.stats().kv_bytes
    assert two.stats().num_devices == 2
    bytes_of = {engine: engine.kv.classes["tiny", "fp32"].page_bytes for engine in (one, two, eight)}
    assert [bytes_of[one] / bytes_of[engine] for engine in (two, eight)] == [2.0, 4.0]
    costs = [engine.scheduler.profiles["tiny"].model.weight_bytes for engine in (one, two)]
    assert 0.5 < costs[1] / costs[0] < 0.55  # norms are everybody's
    with pytest.raises(ConfigError, match=r"'1000GB' is .* more than the .* of each of 2 devices"):
        Engine(model(), EngineConfig(kv_memory="1000GB", tensor_parallel=2))


@pytest.mark.slow
@pytest.mark.parametrize("own", [slice(5, 6), slice(6, 8)])
def test_an_engine_computes_on_the_devices_that_it_is_given(own):
    """One that is not JAX's first, or two that are not its first two; the model stays where it was."""
    own = jax.devices()[own]
    sizes = {"kv_memory": "400KB", "max_seq_len": 64, "tensor_parallel": len(own)}
    engine = Engine(model(), EngineConfig(kv_formats=("fp32",), kv_precision="fp32", **sizes), devices=own)
    short = GREEDY.model_copy(update={"max_tokens": 4, "prompt_logprobs": None})
    (found,) = serve(engine, PROMPTS[:1], ["fp32"], short)
    assert found.output_token_ids == expected()[0].output_token_ids[:4]
    arrays = [engine.arena.units, *jax.tree.leaves(engine.runner.params)]
    assert {device for array in arrays for device in array.devices()} == set(own)
    assert {d for array in jax.tree.leaves(model().params) for d in array.devices()} == {jax.devices()[0]}


def test_weights_that_another_engine_has_divided_are_not_taken_for_whole():
    divided = engine_of(2).model
    for devices in (1, 4):
        with pytest.raises(ConfigError, match=f"divided among the devices of another engine.*{devices} in number"):
            Engine(divided, EngineConfig(kv_memory="1MB", max_seq_len=64, tensor_parallel=devices))


def test_too_few_devices_and_models_that_cannot_be_divided_are_refused():
    with pytest.raises(ConfigError, match="tensor_parallel=9 needs 9 devices, JAX finds 8; use at most 8"):
        Engine(model(), EngineConfig(tensor_parallel=9))
    with pytest.raises(ConfigError, match="tensor_parallel=2 needs 2 devices, the engine was given 1"):
        Engine(model(), EngineConfig(tensor_parallel=2), devices=jax.devices()[:1])
    with pytest.raises(ConfigError, match=r"8 query heads, which 3 devices.*tensor_parallel=1, 2, 4, 8"):
        Engine(model(), EngineConfig(tensor_parallel=3))
    with pytest.raises(ConfigError, match="reproducible with tensor_parallel=2"):
        EngineConfig(reproducible=True, tensor_parallel=2)


# -- page operations -------------------------------------------------------------------------------------------------

GEOMETRY = PageGeometry(
    num_layers=2, kv_heads=1, head_dim=32, page_size=16, unit_words=choose_unit_words(head_dim=32, page_size=16)
)
CLASSES = page_classes("tiny", GEOMETRY, ["bf16", "int8", "int4"])
SLAB_UNITS, SLABS = 6 * CLASSES["tiny", "bf16"].page_units, 8


def test_each_device_does_with_its_pages_what_one_device_would():
    """Copied, narrowed, saved and loaded, bit for bit; each device's arena holds something else."""
    bf16, int8 = (CLASSES["tiny", name] for name in ("bf16", "int8"))
    words = np.random.default_rng(0).integers(0, 2**14, (4, SLABS * SLAB_UNITS, *GEOMETRY.unit_shape), np.uint16)

    def stream(host):
        pages = [slab * SLAB_UNITS + bf16.page_units for slab in (1, 2)]
        return [
            Copy(pages[0], 5 * SLAB_UNITS, bf16, int8),
            Copy(pages[1], 6 * SLAB_UNITS, bf16, bf16),
            Save(host, [pages]),
            Copy(pages[0], pages[1], bf16, bf16),
            Load(host, [[3 * SLAB_UNITS, 4 * SLAB_UNITS]]),
        ]

    def run(group, arena):
        operations = PageOperations(Arena(GEOMETRY, SLABS * SLAB_UNITS, group), {("tiny", 0): GEOMETRY}, SLAB_UNITS)
        operations.arena.units = jax.device_put(arena, operations.arena.units.sharding)
        host = HostPages([bf16], [2])
        operations.apply(stream(host))
        return np.array(operations.arena.units), host.words[0]

    group = device_group(4)
    after, saved = run(group, words.reshape(-1, *GEOMETRY.unit_shape))
    alone = [run(device_group(1), own) for own in words]
    np.testing.assert_array_equal(after, np.concatenate([arena for arena, _ in alone]))
    np.testing.assert_array_equal(saved, np.concatenate([own for _, own in alone], axis=1))


# -- many models and formats of weights, in slow runs ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixtral", "gpt_oss", "olmo2", "cohere2", "gemma3", "qwen3"])
def test_families_say_over_two_devices_what_transformers_say(case):
    """Experts over devices, norms across heads, sinks, windows, biases, vocabularies that do not divide."""
    source = loaded(case)
    if case == "gpt_oss":
        with pytest.raises(ConfigError, match="the model has 3 experts, which 2 devices cannot share evenly"):
            make_engine(source, tensor_parallel=2)
        return
    with np.load(f"tests/fixtures/{case}/expected.npz") as stored:
        prompt, count = stored["tokens"].tolist(), len(stored["greedy"])
    engine = make_engine(source, max_chunk_tokens=16, tensor_parallel=2)
    scored = SamplingParams(max_tokens=count, ignore_eos=True, logprobs=1, prompt_logprobs=0)
    for request in serve(engine, [prompt, prompt[:20], prompt], ["fp32"] * 3, scored)[::2]:
        assert_as_expected(case, request)
        assert_prompt_as_expected(case, request)


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "limit"), [("bf16", 0.05), ("int8", 0.25), ("int4", 0.05)])
def test_weights_of_all_formats(weights, limit):
    """8-bit weights round what they are given to 8 bits under one scale a vector; here a device's part of it."""
    shape = {**SHAPE, "head_dim": 64, "intermediate_size": 256}
    served = []
    for devices in (1, 2):
        config = EngineConfig(
            kv_formats=("fp32",), kv_precision="fp32", kv_memory="2MB", max_seq_len=96, tensor_parallel=devices
        )
        served.append(serve(Engine(random_model(weights=weights, **shape), config), PROMPTS, ["fp32"] * 4, GREEDY))
    assert_alike(served[1], served[0], limit)


@pytest.mark.slow
def test_two_models_of_different_shapes_share_the_arenas_and_the_kernels_of_gpus_agree(monkeypatch):
    models = {"wide": model(), "narrow": dataclasses.replace(model(num_kv_heads=1, head_dim=16), name="narrow")}

    def run(devices, formats=("int8", "int4")):
        config = EngineConfig(kv_formats=formats, kv_precision="int8", kv_memory="1MB", max_seq_len=96,
                              max_batch_size=4, max_chunk_tokens=32, tensor_parallel=devices)  # fmt: skip
        names = ["wide", "narrow", "wide", "narrow"]
        kinds = [formats[0], formats[1], formats[1], formats[0]]
        return serve(Engine(models, config), PROMPTS, kinds, GREEDY, names)

    wanted = run(1)
    assert_alike(run(2), wanted)
    monkeypatch.setenv("FINESERVE_ATTENTION", "triton")
    assert_alike(run(2), wanted)


@pytest.mark.slow
def test_the_real_model_over_three_devices_says_what_one_says():
    """9 query heads and 3 KV heads."""
    served = []
    for devices in (1, 3):
        group = device_group(devices)
        config = EngineConfig(
            kv_formats=("fp32", "int8"),
            kv_precision="fp32",
            kv_memory="64MiB",
            max_seq_len=128,
            tensor_parallel=devices,
        )
        engine = Engine(load_model("smollm2-135m", "fp32", group), config)
        prompts = [engine.tokenizer.encode(text) for text in ("The capital of France is", "Water boils at")]
        served.append(serve(engine, prompts, ["fp32", "int8"], GREEDY.model_copy(update={"max_tokens": 16})))
    assert_alike(served[1], served[0])
