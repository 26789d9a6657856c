"""Mixtures of experts: each token goes through the few experts that a router chooses for it.

    x f32[N, hidden] -> router -> for each token its experts and their weights
      -> pairs of a token and an expert, sorted by expert -> each expert's MLP over its own rows
      -> f32[N, hidden], each token's results weighted and added up

An expert is multiplied with the rows that it was chosen for, and no others.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int32

from fineserve_jax.models.layers import SHARDS, Linear, declared, gated, sum_shards
from fineserve_jax.models.model_config import ExpertsConfig, ModelConfig
from fineserve_jax.models.weight_formats import Arrays, Float32Weights, GroupedWeightFormat, WeightFormat, weight_recipe

MIN_TILE, MAX_TILE = 8, 64  # XLA's CPU products of bf16 and int8 are several times slower with fewer than 8 rows

Taken = Float32[jax.Array, "M {self.in_features}"]
Given = Float32[jax.Array, "M {self.out_features}"]
Results = Float32[jax.Array, "M {self.config.hidden_size}"]


class Grouping(NamedTuple):
    """M pairs of a token and one of its experts, sorted by expert.

    order: i32[M], the numbers of the sorted pairs; pair p is of token p // used.
    sizes: i32[experts], how many pairs each expert has; pairs of experts that are not here are behind all of these.
    """

    order: jax.Array
    sizes: jax.Array


class ExpertMatrices(nn.Module):
    """A matrix `[out_features, in_features]` of each expert, and a bias when `use_bias`."""

    count: int
    in_features: int
    out_features: int
    format: WeightFormat
    use_bias: bool

    def setup(self) -> None:
        shapes = self.format.declare(self.out_features, self.in_features)
        self.stored: Arrays = {
            name: self.param(name, declared, jax.ShapeDtypeStruct((self.count, *shape.shape), shape.dtype))
            for name, shape in shapes.items()
        }
        if self.use_bias:
            bias = jax.ShapeDtypeStruct((self.count, self.out_features), jnp.float32)
            self.bias = self.param("bias", declared, bias)

    def of_one(self, expert: Int32[jax.Array, ""], x: Taken) -> Given:
        """The products of rows with the matrix of one expert, whose number is data."""
        y = self.format.dot({name: array[expert] for name, array in self.stored.items()}, x)
        return y + self.bias[expert] if self.use_bias else y

    def of_all(self, x: Taken, sizes: Int32[jax.Array, " count"]) -> Given:
        """The products of rows, sorted by expert, with the matrices of their experts: first `sizes[0]` of expert 0."""
        experts = jnp.repeat(jnp.arange(self.count), sizes, total_repeat_length=len(x))
        assert isinstance(self.format, GroupedWeightFormat), "others take their rows tile by tile"
        y = self.format.grouped_dot(self.stored, x, sizes, experts)
        return y + self.bias[experts] if self.use_bias else y


class Experts(nn.Module):
    """The mixture that takes the place of a gated MLP: f32[N, hidden] -> f32[N, hidden].

    TPUs have a grouped product (`jax.lax.ragged_dot`), of floats and of 8-bit integers. On CPUs and GPUs XLA makes of
    it one of every row with every expert, most of them zero (seen with JAX 0.10.2), so there experts take their rows
    tile by tile.

    shards: how many devices have some of the experts each. All route all tokens, compute what their own experts give,
        and add that up.
    """

    config: ModelConfig
    weights: str
    shards: int = 1

    @property
    def experts(self) -> ExpertsConfig:
        assert self.config.experts is not None, "only models with experts have such layers"
        return self.config.experts

    @property
    def count(self) -> int:
        """How many experts are here."""
        return self.experts.count // self.shards

    def setup(self) -> None:
        cfg, mixture, fmt = self.config, self.experts, weight_recipe(self.weights).linear
        hidden, inner = cfg.hidden_size, mixture.intermediate_size
        # What the router gives decides more than a product: it stays exact.
        self.router = Linear(hidden, mixture.count, Float32Weights(), use_bias=mixture.router_bias)
        self.gate_up = ExpertMatrices(self.count, hidden, 2 * inner, fmt, cfg.mlp_bias)
        self.down = ExpertMatrices(self.count, inner, hidden, fmt, cfg.mlp_bias)

    def __call__(
        self, x: Float32[jax.Array, "N {self.config.hidden_size}"]
    ) -> Float32[jax.Array, "N {self.config.hidden_size}"]:
        weights, chosen = route(self.experts, self.router(x))
        if self.shards > 1:
            chosen = chosen - lax.axis_index(SHARDS) * self.count
            chosen = jnp.where((chosen >= 0) & (chosen < self.count), chosen, self.count)
        groups = group_by_expert(chosen, self.count)
        if isinstance(weight_recipe(self.weights).linear, GroupedWeightFormat):
            results = lax.platform_dependent(x, groups, tpu=self.all_at_once, default=self.tile_by_tile)
        else:
            results = self.tile_by_tile(x, groups)
        by_token = jnp.zeros_like(results).at[groups.order].set(results).reshape(*chosen.shape, -1)
        if self.shards > 1:  # of experts elsewhere there is anything here
            by_token = jnp.where((chosen < self.count)[:, :, None], by_token, 0.0)
        return sum_shards(jnp.sum(by_token * weights[:, :, None], axis=1), self.shards)

    def all_at_once(self, x: jax.Array, groups: Grouping) -> Results:
        """What every pair gives, in sorted order, by grouped products."""
        rows = x[groups.order // self.experts.used]
        gate, up = jnp.split(self.gate_up.of_all(rows, groups.sizes), 2, axis=-1)
        return self.down.of_all(gated(self.config, gate, up), groups.sizes)

    def tile_by_tile(self, x: jax.Array, groups: Grouping) -> Results:
        """The same in tiles of rows of one expert, each multiplied with that expert's matrices.

        A tile at the end of an expert's rows reaches into the next expert's, whose tiles come later and overwrite that.
        """
        num_pairs, used = len(groups.order), self.experts.used
        rows = tile_rows(num_pairs, self.experts.count)
        tiles = -(-groups.sizes // rows)
        last_tile, ends = jnp.cumsum(tiles), jnp.cumsum(groups.sizes)
        token_of_row = jnp.pad(groups.order // used, (0, rows))
        gate_up, down = self.gate_up, self.down

        def compute(tile: jax.Array, results: jax.Array) -> jax.Array:
            expert = jnp.searchsorted(last_tile, tile, side="right").astype(jnp.int32)
            ordinal = tile - (last_tile[expert] - tiles[expert])
            first = ends[expert] - groups.sizes[expert] + ordinal * rows
            taken = x[lax.dynamic_slice_in_dim(token_of_row, first, rows)]
            gate, up = jnp.split(gate_up.of_one(expert, taken), 2, axis=-1)
            given = down.of_one(expert, gated(self.config, gate, up))
            return lax.dynamic_update_slice_in_dim(results, given, first, axis=0)

        results = jnp.zeros((num_pairs + rows, x.shape[1]), jnp.float32)
        return lax.fori_loop(0, last_tile[-1], compute, results)[:num_pairs]


def route(
    experts: ExpertsConfig, logits: Float32[jax.Array, "N count"]
) -> tuple[Float32[jax.Array, "N used"], Int32[jax.Array, "N used"]]:
    """The weights of each token's experts, and their numbers, from the router's logits."""
    top, chosen = lax.top_k(logits, experts.used)
    if experts.normalised:
        return jax.nn.softmax(top, axis=-1), chosen
    return jnp.exp(top - jax.nn.logsumexp(logits, axis=-1, keepdims=True)), chosen


def group_by_expert(chosen: Int32[jax.Array, "N used"], count: int) -> Grouping:
    """The pairs of tokens and experts, sorted by expert, and of one expert by token. Number `count` stands for any
    expert that is not here."""
    of_pair = chosen.reshape(-1)
    return Grouping(jnp.argsort(of_pair, stable=True).astype(jnp.int32), jnp.bincount(of_pair, length=count))


def tile_rows(num_pairs: int, count: int) -> int:
    """Rows of a tile: about as many as an expert has if all have alike, between `MIN_TILE` and `MAX_TILE`."""
    rows = MIN_TILE
    while rows < MAX_TILE and rows * count < num_pairs:
        rows *= 2
    return rows
