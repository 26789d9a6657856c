"""The decoder every family here is an instance of; `ModelConfig` says what differs.

    tokens i32[N] -> embed -> num_layers x (norm, attention, +, norm, gated MLP, +) -> norm -> hidden f32[N, hidden]

Families differ in which norms there are, in multipliers, and in whether attention and MLP work one after the other.

N is a flat, ragged token axis: tokens of many requests side by side, told apart only by `attend`. Layers are
unrolled, because a scan over stacked weights makes XLA copy each layer's weights in every step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float32, Int32

from fineserve_jax.models.experts import Experts
from fineserve_jax.models.layers import NORMS, SHARDS, Linear, Matrix, RMSNorm, gated, soft_cap, sum_shards
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
Flags = Bool[jax.Array, " N"]
Hidden = Float32[jax.Array, "N {self.config.hidden_size}"]
Logits = Float32[jax.Array, "N {self.config.vocab_size}"]


class Attention(nn.Module):
    """Grouped-query attention around the caller's `attend`; q, k and v come from one fused product.

    shards: how many devices have some of the heads each, `config` being of those that are here.
    """

    config: ModelConfig
    weights: str
    shards: int = 1

    def setup(self) -> None:
        cfg, fmt = self.config, weight_recipe(self.weights).linear
        q_size = cfg.qkv_sizes[0]
        self.qkv = Linear(cfg.hidden_size, sum(cfg.qkv_sizes), fmt, use_bias=cfg.qkv_bias)
        self.o = Linear(q_size, cfg.hidden_size, fmt, use_bias=cfg.o_bias, shards=self.shards)
        if cfg.qk_norm:
            q_width, k_width = cfg.qk_norm_sizes
            shards = self.shards if cfg.qk_norm_across_heads else 1
            self.q_norm = RMSNorm(q_width, cfg.norm_eps, shards)
            self.k_norm = RMSNorm(k_width, cfg.norm_eps, shards)
        if cfg.attention_sinks:
            self.sinks = self.param("sinks", nn.initializers.zeros, (cfg.num_heads,), jnp.float32)

    def __call__(self, x: Hidden, rope: RopeTables | None, attend: AttendLayer) -> Hidden:
        """rope: the rotations of the tokens' positions; None: q and k are not turned."""
        cfg = self.config
        q_size, k_size, _ = cfg.qkv_sizes
        q, k, v = jnp.split(self.qkv(x), (q_size, q_size + k_size), axis=-1)
        if cfg.qk_norm and cfg.qk_norm_across_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (part.reshape(x.shape[0], -1, cfg.head_dim) for part in (q, k, v))
        if cfg.qk_norm and not cfg.qk_norm_across_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        sinks = (self.sinks,) if cfg.attention_sinks else ()
        if rope is not None:
            q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        mixed = attend(q, k, v, *sinks)
        return self.o(mixed.reshape(x.shape[0], q_size))


class GatedMLP(nn.Module):
    """down(gated(gate(x), up(x))), gate and up in one fused product.

    shards: how many devices have a part of the width each, `config` being of that which is here.
    """

    config: ModelConfig
    weights: str
    shards: int = 1

    def setup(self) -> None:
        cfg, fmt = self.config, weight_recipe(self.weights).linear
        self.gate_up = Linear(cfg.hidden_size, 2 * cfg.intermediate_size, fmt, use_bias=cfg.mlp_bias)
        self.down = Linear(cfg.intermediate_size, cfg.hidden_size, fmt, use_bias=cfg.mlp_bias, shards=self.shards)

    def __call__(self, x: Hidden) -> Hidden:
        gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        return self.down(gated(self.config, gate, up))


class Block(nn.Module):
    """One layer on a f32 residual stream: attention, then MLP, or both at once, with norms before or after them.

    config: of the whole model.
    has_experts: whether a mixture of experts takes the place of the MLP.
    shards: how many devices compute the layer together.
    """

    config: ModelConfig
    weights: str
    has_experts: bool = False
    shards: int = 1

    def setup(self) -> None:
        cfg = self.config
        if cfg.pre_norms:
            self.attn_norm = residual_norm(cfg)
        own = cfg.of_shard(self.shards)
        self.attn = Attention(own, self.weights, self.shards)
        if cfg.post_norms:
            self.attn_post_norm = residual_norm(cfg)
        if cfg.pre_norms and not cfg.parallel:
            self.mlp_norm = residual_norm(cfg)
        self.mlp = (Experts if self.has_experts else GatedMLP)(own, self.weights, self.shards)
        if cfg.post_norms:
            self.mlp_post_norm = residual_norm(cfg)

    def __call__(self, x: Hidden, rope: RopeTables | None, attend: AttendLayer) -> Hidden:
        cfg = self.config
        taken = self.attn_norm(x) if cfg.pre_norms else x
        attended = self.attn(taken, rope, attend)
        attended = self.attn_post_norm(attended) if cfg.post_norms else attended
        x = x + cfg.residual_multiplier * attended
        if not cfg.parallel:
            taken = self.mlp_norm(x) if cfg.pre_norms else x
        widened = self.mlp(taken)
        widened = self.mlp_post_norm(widened) if cfg.post_norms else widened
        return x + cfg.residual_multiplier * widened


def residual_norm(config: ModelConfig) -> nn.Module:
    """The norm of `config` over the residual stream's width."""
    return NORMS[config.norm](config.hidden_size, config.norm_eps)


class CausalLM(nn.Module):
    """A decoder-only language model.

    `model.apply({"params": params}, tokens, positions, attend)` gives hidden states,
    `model.apply({"params": params}, hidden, method="logits")` the logits of those rows that need them.

    shards: how many devices compute the model together, each with its shard of `params` (see `sharding`), inside
        `jax.shard_map` over the axis `SHARDS`. What goes in and comes out is the same on all.
    """

    config: ModelConfig
    weights: str = "fp32"
    shards: int = 1

    def setup(self) -> None:
        cfg, recipe, shards = self.config, weight_recipe(self.weights), self.shards
        table = recipe.head if cfg.tie_embeddings else recipe.embedding
        self.embed = Matrix(cfg.hidden_size, self.vocab_rows, table)
        self.layers = [Block(cfg, self.weights, cfg.has_experts(layer), shards) for layer in range(cfg.num_layers)]
        self.norm = residual_norm(cfg)
        if not cfg.tie_embeddings:
            self.lm_head = Matrix(cfg.hidden_size, self.vocab_rows, recipe.head)

    @property
    def vocab_rows(self) -> int:
        """Rows of the vocabulary's tables that a device has; behind the last token they are padding."""
        return -(-self.config.vocab_size // self.shards)

    def __call__(self, tokens: Tokens, positions: Tokens, attend: Attend, long: Flags | None = None) -> Hidden:
        """tokens i32[N] at positions i32[N] -> hidden f32[N, hidden_size], after the final norm.

        long: see `embed_tokens`.
        """
        x, ropes = self.embed_tokens(tokens, positions, long)
        groups = self.config.layer_groups
        rope_of = {layer: rope for group, rope in zip(groups, ropes, strict=True) for layer in group.layers}
        for index, block in enumerate(self.layers):
            rope = None if index in self.config.no_rope_layers else rope_of[index]
            x = block(x, rope, functools.partial(attend, index))
        return self.norm(x)

    def embed_tokens(
        self, tokens: Tokens, positions: Tokens, long: Flags | None = None
    ) -> tuple[Hidden, tuple[RopeTables, ...]]:
        """The residual stream f32[N, hidden_size] before the first layer, and for each of the configuration's
        `layer_groups` the rotations of the positions.

        long: bool[N], whether a token's sequence outgrows the original context of longrope; None: none does.
        """
        configs = [self.config.with_rope_of(group) for group in self.config.layer_groups]
        ropes = tuple(rope_tables(config, positions, long) for config in configs)
        return self._rows(tokens) * self.config.embedding_multiplier, ropes

    def _rows(self, tokens: Tokens) -> Hidden:
        """The tokens' rows of the embedding table; each is there on one device."""
        if self.shards == 1:
            return self.embed.rows(tokens)
        own = tokens - lax.axis_index(SHARDS) * self.vocab_rows
        is_here = (own >= 0) & (own < self.vocab_rows)
        rows = self.embed.rows(jnp.where(is_here, own, 0))
        return sum_shards(jnp.where(is_here[:, None], rows, 0.0), self.shards)

    def head(self, x: Hidden) -> Logits:
        """The residual stream after the last layer, f32[M, hidden_size] -> logits f32[M, vocab_size]."""
        return self.logits(self.last_hidden(x))

    def last_hidden(self, x: Hidden) -> Hidden:
        """The residual stream after the last layer, f32[M, hidden_size] -> hidden states of that shape, after the final
        norm."""
        return self.norm(x)

    def logits(self, hidden: Hidden) -> Logits:
        """hidden f32[M, hidden_size] -> f32[M, vocab_size]."""
        head = self.embed if self.config.tie_embeddings else self.lm_head
        logits = soft_cap(head.dot(hidden) * self.config.logit_multiplier, self.config.logit_soft_cap)
        if self.shards == 1:
            return logits
        return lax.all_gather(logits, SHARDS, axis=1, tiled=True)[:, : self.config.vocab_size]

    def declare(self, tokens: Tokens, positions: Tokens) -> Logits:
        """Touch every parameter once, with attention that keeps only q, so that `init` declares them all."""
        return self.logits(self(tokens, positions, lambda layer, q, k, v, *sinks: q))


def block_of(model: CausalLM, params: Mapping[str, Any]) -> Block:
    """A layer by itself, for callers that run them one by one, told from its params, `params["layers_<i>"]`."""
    return Block(model.config, model.weights, has_experts="router" in params["mlp"], shards=model.shards)
