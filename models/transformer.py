"""The decoder every family here is an instance of; `ModelConfig` says what differs.

    tokens i32[N] -> embed -> num_layers x (norm, attention, +, norm, gated MLP, +) -> norm -> hidden f32[N, hidden]

N is a flat, ragged token axis: tokens of many requests side by side, told apart only by `attend`. Layers are
unrolled, because a scan over stacked weights makes XLA copy each layer's weights in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int32

from fineserve_jax.models.layers import ACTIVATIONS, Linear, Matrix, RMSNorm, soft_cap
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.rope import RopeTables, apply_rope, rope_tables
from fineserve_jax.models.weight_formats import weight_recipe


@runtime_checkable
class Attend(Protocol):
    """What the caller supplies: attention of layer `layer`, scale and mask included.

    q f32[N, num_heads, head_dim], k and v f32[N, num_kv_heads, head_dim], q and k after RoPE; with
    `attention_sinks` their logits f32[num_heads] besides. Returns f32[N, num_heads, head_dim].
    """

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array, /, *sinks: jax.Array) -> jax.Array: ...


AttendLayer = Callable[..., jax.Array]  # `Attend` of one layer
Tokens = Int32[jax.Array, " N"]
Hidden = Float32[jax.Array, "N {self.config.hidden_size}"]
Logits = Float32[jax.Array, "N {self.config.vocab_size}"]


class Attention(nn.Module):
    """Grouped-query attention around the caller's `attend`; q, k and v come from one fused product."""

    config: ModelConfig
    weights: str

    def setup(self) -> None:
        cfg, fmt = self.config, weight_recipe(self.weights).linear
        q_size = cfg.qkv_sizes[0]
        self.qkv = Linear(cfg.hidden_size, sum(cfg.qkv_sizes), fmt, use_bias=cfg.qkv_bias)
        self.o = Linear(q_size, cfg.hidden_size, fmt, use_bias=cfg.o_bias)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.norm_eps)
        if cfg.attention_sinks:
            self.sinks = self.param("sinks", nn.initializers.zeros, (cfg.num_heads,), jnp.float32)

    def __call__(self, x: Hidden, rope: RopeTables, attend: AttendLayer) -> Hidden:
        cfg = self.config
        q_size, k_size, _ = cfg.qkv_sizes
        parts = jnp.split(self.qkv(x), (q_size, q_size + k_size), axis=-1)
        q, k, v = (part.reshape(x.shape[0], -1, cfg.head_dim) for part in parts)
        if cfg.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = (self.sinks,) if cfg.attention_sinks else ()
        mixed = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, *sinks)
        return self.o(mixed.reshape(x.shape[0], q_size))


class GatedMLP(nn.Module):
    """down(activation(gate(x)) * up(x)), gate and up in one fused product."""

    config: ModelConfig
    weights: str

    def setup(self) -> None:
        cfg, fmt = self.config, weight_recipe(self.weights).linear
        self.gate_up = Linear(cfg.hidden_size, 2 * cfg.intermediate_size, fmt, use_bias=cfg.mlp_bias)
        self.down = Linear(cfg.intermediate_size, cfg.hidden_size, fmt, use_bias=cfg.mlp_bias)

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(ACTIVATIONS[self.config.activation](gate) * up)


class Block(nn.Module):
    """One layer on a f32 residual stream: attention, then MLP, with norms before them and perhaps after them."""

    config: ModelConfig
    weights: str

    def setup(self) -> None:
        cfg = self.config
        self.attn_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.attn = Attention(cfg, self.weights)
        self.mlp_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        self.mlp = GatedMLP(cfg, self.weights)
        if cfg.post_norms:
            self.attn_post_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
            self.mlp_post_norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)

    def __call__(self, x: Hidden, rope: RopeTables, attend: AttendLayer) -> Hidden:
        attended = self.attn(self.attn_norm(x), rope, attend)
        x = x + (self.attn_post_norm(attended) if self.config.post_norms else attended)
        widened = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(widened) if self.config.post_norms else widened)


class CausalLM(nn.Module):
    """A decoder-only language model.

    `model.apply({"params": params}, tokens, positions, attend)` gives hidden states,
    `model.apply({"params": params}, hidden, method="logits")` the logits of those rows that need them.
    """

    config: ModelConfig
    weights: str = "fp32"

    def setup(self) -> None:
        cfg, recipe = self.config, weight_recipe(self.weights)
        table = recipe.head if cfg.tie_embeddings else recipe.embedding
        self.embed = Matrix(cfg.hidden_size, cfg.vocab_size, table)
        self.layers = [Block(cfg, self.weights) for _ in range(cfg.num_layers)]
        self.norm = RMSNorm(cfg.hidden_size, cfg.norm_eps)
        if not cfg.tie_embeddings:
            self.lm_head = Matrix(cfg.hidden_size, cfg.vocab_size, recipe.head)

    def __call__(self, tokens: Tokens, positions: Tokens, attend: Attend) -> Hidden:
        """tokens i32[N] at positions i32[N] -> hidden f32[N, hidden_size], after the final norm."""
        x, ropes = self.embed_tokens(tokens, positions)
        groups = self.config.layer_groups
        rope_of = {layer: rope for group, rope in zip(groups, ropes, strict=True) for layer in group.layers}
        for index, block in enumerate(self.layers):
            x = block(x, rope_of[index], functools.partial(attend, index))
        return self.norm(x)

    def embed_tokens(self, tokens: Tokens, positions: Tokens) -> tuple[Hidden, tuple[RopeTables, ...]]:
        """The residual stream f32[N, hidden_size] before the first layer, and for each of the configuration's
        `layer_groups` the rotations of the positions."""
        configs = [self.config.with_rope_of(group) for group in self.config.layer_groups]
        ropes = tuple(rope_tables(config, positions) for config in configs)
        return self.embed.rows(tokens) * self.config.embedding_multiplier, ropes

    @property
    def block(self) -> Block:
        """One layer by itself, for callers that run them one by one: its params are `params["layers_<i>"]`."""
        return Block(self.config, self.weights)

    def head(self, x: Hidden) -> Logits:
        """The residual stream after the last layer, f32[M, hidden_size] -> logits f32[M, vocab_size]."""
        return self.logits(self.norm(x))

    def logits(self, hidden: Hidden) -> Logits:
        """hidden f32[M, hidden_size] -> f32[M, vocab_size]."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        return soft_cap(head.dot(hidden), self.config.logit_soft_cap)

    def declare(self, tokens: Tokens, positions: Tokens) -> Logits:
        """Touch every parameter once, with attention that keeps only q, so that `init` declares them all."""
        return self.logits(self(tokens, positions, lambda layer, q, k, v, *sinks: q))
