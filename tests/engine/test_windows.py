"""Sliding windows, soft caps and attention sinks: requests read what a plain forward pass computes."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from engine_cases import random_model, serve

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.kv.usage import count_events
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.models import build_model
from fineserve_jax.request.request import Request
from fineserve_jax.request.sampling_params import SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "some layers, a window of two pages": {"sliding_window": 32, "full_attention_layers": (1,)},
    "all layers, a window within a page": {"sliding_window": 5, "attention_soft_cap": 0.5},
    "soft caps and sinks": {"attention_soft_cap": 1.0, "attention_sinks": True},
}
PROMPTS = [np.random.default_rng(i).integers(1, 96, length).tolist() for i, length in enumerate((1, 15, 70, 120))]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True, logprobs=2)


def make_engine(model: LoadedModel, formats: Sequence[str], **settings: Any) -> Engine:
    defaults = {"kv_memory": "8MiB", "max_seq_len": 256, "max_chunk_tokens": 64, "max_batch_size": 8}
    engine = Engine(model, EngineConfig(kv_formats=formats, kv_precision=formats[0], **(defaults | settings)))
    engine.runner.use_formats(formats)
    return engine


def expected_logprobs(model: LoadedModel, tokens: list[int]) -> np.ndarray:
    """f32[tokens, vocab], log-probabilities after each token. Computed with others behind them, for one program."""
    cfg, count = model.config, 160
    window_of = {layer: group.window or count for group in cfg.layer_groups for layer in group.layers}
    ahead = np.arange(count)[:, None] - np.arange(count)
    scale, exact = cfg.attention_scale, jax.lax.Precision.HIGHEST

    def attend(layer, q, k, v, sinks=None):
        k, v = (jnp.repeat(part, cfg.num_heads // cfg.num_kv_heads, axis=1) for part in (k, v))
        logits = jnp.einsum("qhd,khd->hqk", q, k, precision=exact) * scale
        if cfg.attention_soft_cap is not None:
            logits = cfg.attention_soft_cap * jnp.tanh(logits / cfg.attention_soft_cap)
        logits = jnp.where((ahead >= 0) & (ahead < window_of[layer]), logits, -jnp.inf)
        if sinks is not None:
            logits = jnp.concatenate([logits, jnp.broadcast_to(sinks[:, None, None], (*logits.shape[:2], 1))], axis=2)
        weights = jax.nn.softmax(logits, axis=-1)[:, :, :count]
        return jnp.einsum("hqk,khd->qhd", weights, v, precision=exact)

    module = build_model(cfg, model.weights)

    @jax.jit
    def compute(params, token_ids):
        hidden = module.apply({"params": params}, token_ids, jnp.arange(count), attend)
        return jax.nn.log_softmax(module.apply({"params": params}, hidden, method="logits"))

    padded = np.pad(np.array(tokens, np.int32), (0, count - len(tokens)))
    return np.asarray(compute(model.params, padded))[: len(tokens)]


def assert_read_as_expected(model: LoadedModel, request: Request) -> None:
    expected = expected_logprobs(model, request.token_ids[:-1])[request.num_prompt_tokens - 1 :]
    sampled = [step.logprob for step in request.logprobs]
    np.testing.assert_allclose(sampled, expected[range(len(sampled)), request.output_token_ids], rtol=0, atol=1e-4)
    assert (expected.max(axis=1) - sampled < 1e-4).all(), "the most likely token was sampled"


@pytest.mark.parametrize("shape", SHAPES)
def test_requests_compute_what_a_plain_forward_pass_does(shape):
    model = random_model(**SHAPES[shape])
    if model.config.attention_sinks:  # of the size of logits, so that they matter
        params = {**model.params}
        for layer, size in (("layers_0", 1.5), ("layers_1", -0.5)):
            params[layer] = {**params[layer], "attn": {**params[layer]["attn"], "sinks": jnp.full(4, size)}}
        model = dataclasses.replace(model, params=params)
    engine = make_engine(model, ["fp32"])
    for request in serve(engine, PROMPTS, ["fp32"] * len(PROMPTS), GREEDY):
        assert_read_as_expected(model, request)


@pytest.mark.slow
def test_tokens_do_not_depend_on_chunks_or_the_batch():
    model, formats = random_model(sliding_window=20, full_attention_layers=(0,)), ["int8", "int4"]
    rows = [(prompt, name) for prompt in PROMPTS for name in formats]
    prompts, precisions = [prompt for prompt, _ in rows], [name for _, name in rows]
    together = serve(make_engine(model, formats), prompts, precisions, GREEDY)
    alone = make_engine(model, formats, max_chunk_tokens=16, prefix_cache="off")
    for (prompt, name), request in zip(rows, together, strict=True):
        (other,) = serve(alone, [prompt], [name], GREEDY)
        assert other.output_token_ids == request.output_token_ids, name


def test_under_pressure_windowed_layers_are_narrowed_and_swapped():
    model, formats = random_model(sliding_window=40, full_attention_layers=(0,)), ["bf16", "int8"]
    prompts = [np.random.default_rng(i).integers(1, 96, 60 + i).tolist() for i in range(6)]
    long, small = SamplingParams(max_tokens=100, ignore_eos=True), {"kv_memory": "160KB", "preemption": "swap"}
    alone = make_engine(model, formats, **small)
    expected = [serve(alone, [prompt], ["int8"], long)[0] for prompt in prompts]
    assert alone.stats().num_preemptions == 0
    narrowing = make_engine(model, formats, **small, min_kv_precision="int8")
    mixed = serve(narrowing, prompts, ["int8", "bf16"] * 3, long)
    assert narrowing.kv.num_narrowed_pages > 0
    swapping = make_engine(model, formats, **small)
    swapped = serve(swapping, prompts, ["int8"] * 6, long)
    assert count_events(swapping.kv).saved_requests > 0
    assert [r.output_token_ids for r in mixed[::2]] == [r.output_token_ids for r in expected[::2]]
    assert [r.output_token_ids for r in swapped] == [r.output_token_ids for r in expected]


def test_a_window_does_not_limit_the_length_of_requests():
    assert make_engine(random_model(sliding_window=16), ["fp32"], max_seq_len=None).max_seq_len == 512
