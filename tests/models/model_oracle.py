"""Oracles for the model tests: a plain causal `attend`, and the whole forward pass again in float64 numpy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from fineserve_jax.models import Attend, CausalLM, ModelConfig

FIXTURES = Path(__file__).parents[1] / "fixtures"
CASES = tuple(sorted(path.parent.name for path in FIXTURES.glob("*/expected.npz")))
EXPERTS = ("gpt_oss", "mixtral", "qwen3_moe", "qwen3_moe_dense")

Tensors = dict[str, np.ndarray]


def case_config(case: str) -> dict[str, Any]:
    return json.loads((FIXTURES / case / "config.json").read_text())


def case_tensors(case: str) -> Tensors:
    return load_file(FIXTURES / case / "model.safetensors")


def case_expected(case: str) -> tuple[np.ndarray, np.ndarray]:
    """tokens i32[N] and the logits f32[N, vocab] transformers computed for them."""
    with np.load(FIXTURES / case / "expected.npz") as stored:
        return stored["tokens"], stored["logits"]


def causal_attend(
    config: ModelConfig, positions: np.ndarray | jax.Array, sequence: np.ndarray | jax.Array | None = None
) -> Attend:
    """Attention to the tokens of the same sequence at the same or earlier positions, within the window.

    positions, sequence: i32[N], known or traced; one sequence when left out.
    """
    distance = positions[:, None] - positions[None, :]
    seen = distance >= 0
    if sequence is not None:
        seen &= sequence[:, None] == sequence[None, :]
    window_of = {layer: group.window for group in config.layer_groups for layer in group.layers}
    group = config.num_heads // config.num_kv_heads
    exact = jax.lax.Precision.HIGHEST

    def attend(layer: int, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
        window = window_of[layer]
        hidden = jnp.where(seen if window is None else seen & (distance < window), 0.0, -1e30)
        k, v = jnp.repeat(k, group, axis=1), jnp.repeat(v, group, axis=1)
        scores = jnp.einsum("qhd,khd->hqk", q, k, precision=exact) * config.attention_scale
        if (cap := config.attention_soft_cap) is not None:
            scores = cap * jnp.tanh(scores / cap)
        scores += hidden
        if sinks is not None:  # a further logit, of no value
            scores = jnp.concatenate([scores, jnp.broadcast_to(sinks[:, None, None], (*scores.shape[:2], 1))], axis=2)
        weights = jax.nn.softmax(scores, axis=-1)[:, :, : len(k)]
        return jnp.einsum("hqk,khd->qhd", weights, v, precision=exact)

    return attend


def flax_logits(
    model: CausalLM,
    params: dict[str, Any],
    tokens: np.ndarray,
    positions: np.ndarray | None = None,
    attend: Attend | None = None,
) -> np.ndarray:
    """Logits of every token; of one sequence unless positions and attention say otherwise.

    With longrope, all tokens are taken to be of sequences as long as the longest.
    """
    positions = np.arange(len(tokens), dtype=np.int32) if positions is None else positions
    attend = attend or causal_attend(model.config, positions)

    scaling = model.config.rope_scaling
    long = jnp.full(len(tokens), scaling is not None and max(positions) >= scaling.original_max_position)

    @jax.jit
    def step(params: dict[str, Any], tokens: jax.Array, positions: jax.Array) -> jax.Array:
        hidden = model.apply({"params": params}, tokens, positions, attend, long)
        return model.apply({"params": params}, hidden, method="logits")

    return np.asarray(step(params, jnp.asarray(tokens), jnp.asarray(positions)))


def float64_logits(config: ModelConfig, tensors: Tensors, tokens: np.ndarray) -> np.ndarray:
    """The textbook forward pass, from tensors by Hugging Face name."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(config.num_layers):
        pre = f"model.layers.{layer}."
        x = x + _attention(config, w, layer, _norm(config, x, w[pre + "input_layernorm.weight"]))
        h = _norm(config, x, w[pre + "post_attention_layernorm.weight"])
        gate, up = _affine(w, pre + "mlp.gate_proj", h), _affine(w, pre + "mlp.up_proj", h)
        x = x + _affine(w, pre + "mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    head = "model.embed_tokens.weight" if config.tie_embeddings else "lm_head.weight"
    return _norm(config, x, w["model.norm.weight"]) @ w[head].T


def _attention(config: ModelConfig, w: Tensors, layer: int, h: np.ndarray) -> np.ndarray:
    n, d, pre = len(h), config.head_dim, f"model.layers.{layer}."
    (window,) = (group.window for group in config.layer_groups if layer in group.layers)
    q, k, v = (_affine(w, f"{pre}self_attn.{part}_proj", h).reshape(n, -1, d) for part in "qkv")
    if config.qk_norm:
        q = _norm(config, q, w[pre + "self_attn.q_norm.weight"])
        k = _norm(config, k, w[pre + "self_attn.k_norm.weight"])
    q, k = _rotate(config, q), _rotate(config, k)
    out = np.zeros((n, config.num_heads, d))
    for head in range(config.num_heads):
        kv = head // (config.num_heads // config.num_kv_heads)
        for t in range(n):
            first = 0 if window is None else max(0, t - window + 1)
            scores = k[first : t + 1, kv] @ q[t, head] / math.sqrt(d)
            weights = np.exp(scores - scores.max())
            out[t, head] = weights / weights.sum() @ v[first : t + 1, kv]
    return _affine(w, pre + "self_attn.o_proj", out.reshape(n, -1))


def _rotate(config: ModelConfig, x: np.ndarray) -> np.ndarray:
    """Pair (i, i + d/2) as one complex number, turned by position * frequency. Plain and linear RoPE only."""
    half = config.head_dim // 2
    stretch = config.rope_scaling.factor if config.rope_scaling else 1.0
    assert config.rope_scaling is None or config.rope_scaling.kind == "linear"
    angles = np.arange(len(x))[:, None] / stretch * config.rope_theta ** (-np.arange(half) / half)
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angles)[:, None, :]
    return np.concatenate([turned.real, turned.imag], axis=-1)


def _norm(config: ModelConfig, x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * scale


def _affine(w: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)
