"""The layers all families share. Activations are f32 `[N, width]` over a flat token axis."""

from __future__ import annotations

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float32, Int32

from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.weight_formats import Arrays, WeightFormat

SHARDS = "fineserve_shards"
"""The mesh axis over which a model is divided, see `sharding`; no other mesh has one of this name."""


class Matrix(nn.Module):
    """A stored matrix `[out_features, in_features]`: products, and row look-up as an embedding table."""

    in_features: int
    out_features: int
    format: WeightFormat

    def setup(self) -> None:
        shapes = self.format.declare(self.out_features, self.in_features)
        self.stored: Arrays = {name: self.param(name, declared, shape) for name, shape in shapes.items()}

    def dot(self, x: Float32[jax.Array, "N {self.in_features}"]) -> Float32[jax.Array, "N {self.out_features}"]:
        """The product with each of N vectors."""
        return self.format.dot(self.stored, x)

    def rows(self, ids: Int32[jax.Array, " N"]) -> Float32[jax.Array, "N {self.in_features}"]:
        """The rows of those numbers."""
        return self.format.rows(self.stored, ids)


class Linear(Matrix):
    """f32[N, in_features] -> f32[N, out_features], with a f32 bias when `use_bias`.

    shards: how many devices hold some of the columns each, `in_features` of them, and add up what they get; 1: all are
        here.
    """

    use_bias: bool = False
    shards: int = 1

    def setup(self) -> None:
        super().setup()
        if self.use_bias:
            self.bias = self.param("bias", declared, jax.ShapeDtypeStruct((self.out_features,), jnp.float32))

    def __call__(self, x: Float32[jax.Array, "N {self.in_features}"]) -> Float32[jax.Array, "N {self.out_features}"]:
        y = sum_shards(self.dot(x), self.shards)
        return y + self.bias if self.use_bias else y


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * scale over the last axis (arXiv 1910.07467), all in f32.

    shards: how many devices hold `width` of the values each, over all of which the mean is; 1: all are here.
    """

    width: int
    eps: float
    shards: int = 1

    @nn.compact
    def __call__(self, x: Float32[jax.Array, "*leading {self.width}"]) -> Float32[jax.Array, "*leading {self.width}"]:
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        if self.shards > 1:
            mean = lax.pmean(mean, SHARDS)
        return x * lax.rsqrt(mean + self.eps) * scale


class LayerNorm(nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * scale over the last axis, without a bias, all in f32."""

    width: int
    eps: float

    @nn.compact
    def __call__(self, x: Float32[jax.Array, "*leading {self.width}"]) -> Float32[jax.Array, "*leading {self.width}"]:
        scale = self.param("scale", nn.initializers.ones, (self.width,), jnp.float32)
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + self.eps) * scale


NORMS = {"rms": RMSNorm, "layer": LayerNorm}
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def sum_shards(x: jax.Array, shards: int) -> jax.Array:
    """What the devices have of a sum, added up on each of them."""
    summed: jax.Array = x if shards == 1 else lax.psum(x, SHARDS)
    return summed


def soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap): about x where that is small, and never beyond the cap. None caps nothing."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def declared(_: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
    """The initialiser of stored arrays. Real values always come from `pack_params`; Flax needs only the declaration."""
    return jnp.zeros(shape.shape, shape.dtype)


def gated(config: ModelConfig, gate: Float32[jax.Array, "N inner"], up: Float32[jax.Array, "N inner"]) -> jax.Array:
    """What an MLP makes of its gates and what they gate, f32[N, inner]: activation(gate) * up, or gpt-oss's form."""
    if config.gate_limit is None:
        return ACTIVATIONS[config.activation](gate) * up
    gate, up = jnp.minimum(gate, config.gate_limit), jnp.clip(up, -config.gate_limit, config.gate_limit)
    return gate * jax.nn.sigmoid(config.gate_slope * gate) * (up + 1.0)
