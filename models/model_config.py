"""What a decoder-only model looks like: frozen, hashable, and static for `jit`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.rope_scaling import RopeScaling

NormKind = Literal["rms", "layer"]
Activation = Literal["silu", "gelu_tanh"]


MOST_EXPERTS = 1 << 16
"""Of all layers of a model: four times as many as any published one has, so that a damaged file is known as one."""


@dataclasses.dataclass(frozen=True)
class ExpertsConfig:
    """A mixture of experts in the place of the MLP.

    count: experts of a layer.
    used: how many of them a token goes through, those that the router gives the largest logits.
    intermediate_size: of one expert.
    normalised: whether a token's experts are weighted by a softmax over their logits; else by one over all experts'.
    router_bias: whether the router's logits have a bias.
    dense_layers: numbers of the layers that have an MLP all the same, ascending.
    """

    count: int
    used: int
    intermediate_size: int
    normalised: bool = True
    router_bias: bool = False
    dense_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("count", "used", "intermediate_size"):
            if getattr(self, name) <= 0:
                raise ModelLoadError(f"model config: {name} of experts is {getattr(self, name)}, must be at least 1")
        if self.used > self.count:
            raise ModelLoadError(f"model config: a token cannot use {self.used} of {self.count} experts")


@dataclasses.dataclass(frozen=True)
class LayerGroup:
    """Layers whose attention is alike.

    layers: their numbers, ascending.
    window: how many newest tokens they attend to, a token itself included; None: all.
    """

    layers: tuple[int, ...]
    window: int | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of one decoder-only transformer.

    family: name in the registry, such as `llama`.
    head_dim: values per head; need not be hidden_size / num_heads.
    rotary_dim: how many values of a head RoPE turns, the first ones; None: all.
    norm: of the residual stream: RMSNorm, or LayerNorm without bias (Cohere).
    pre_norms, post_norms: whether what attention and MLP take, and what they give, is normalised. Olmo 2 has only the
        latter.
    parallel: attention and MLP take the same normalised input, and both are added at once (Cohere).
    qkv_bias, o_bias: whether the attention projections carry biases.
    mlp_bias: whether the projections of the MLP, or of the experts, carry biases.
    experts: the mixture of experts that most layers have; None: all have an MLP.
    activation: of the MLP's gates; `gelu_tanh` is GELU's approximation by tanh (Gemma).
    gate_limit: gates are clamped to at most this and what they gate to its amount, and they are joined in gpt-oss's
        way (see `gated`); None: activation(gate) * up.
    gate_slope: of the sigmoid in that.
    qk_norm: RMSNorm over head_dim on q and k before RoPE (Qwen3).
    qk_norm_across_heads: that norm is over all heads together (Olmo 2).
    embedding_multiplier: of the embedded tokens.
    attention_multiplier: of the logits of attention; None: 1 / sqrt(head_dim).
    residual_multiplier: of what attention and MLP add to the residual stream.
    logit_multiplier: of the output head's logits.
    logit_soft_cap: the output head's logits are capped to cap * tanh(logit / cap); None: not.
    no_rope_layers: numbers of the layers without RoPE, ascending.
    local_rope_theta: base of RoPE, without scaling, in the layers with a window; None: theirs is that of all.
    max_position: context length in tokens the checkpoint declares.
    sliding_window: attend only to that many newest tokens, a token itself included; None attends to all.
    full_attention_layers: numbers of the layers that attend to all although there is a sliding window, ascending.
    attention_soft_cap: logits of attention are capped to cap * tanh(logit / cap); None: not.
    attention_sinks: whether each head has a learnt logit that takes part in the softmax and has no value (gpt-oss).
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    rotary_dim: int | None = None
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    norm: NormKind = "rms"
    pre_norms: bool = True
    post_norms: bool = False
    parallel: bool = False
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    experts: ExpertsConfig | None = None
    activation: Activation = "silu"
    gate_limit: float | None = None
    gate_slope: float = 1.702
    qk_norm: bool = False
    qk_norm_across_heads: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    residual_multiplier: float = 1.0
    logit_multiplier: float = 1.0
    logit_soft_cap: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    local_rope_theta: float | None = None
    max_position: int = 2048
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    attention_soft_cap: float | None = None
    attention_sinks: bool = False

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
        for name in (*sizes, "intermediate_size", "max_position"):
            if getattr(self, name) <= 0:
                raise ModelLoadError(f"model config: {name} is {getattr(self, name)}, must be at least 1")
        bases = (self.rope_theta, self.local_rope_theta or self.rope_theta)
        if not (0.0 < self.norm_eps < 1.0 and all(1.0 < base < math.inf for base in bases)):
            raise ModelLoadError(
                f"model config: norm_eps is {self.norm_eps} and bases of RoPE are {bases}; "
                "they must lie between 0 and 1, and above 1"
            )
        if self.num_heads % self.num_kv_heads:
            raise ModelLoadError(
                f"model config: {self.num_heads} query heads cannot share {self.num_kv_heads} KV heads evenly"
            )
        self._check_attention()
        self._check_rope()
        self._check_multipliers()

    def _check_attention(self) -> None:
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelLoadError(f"model config: sliding_window is {self.sliding_window}, must be at least 1")
        if self.experts is not None and self.num_layers * self.experts.count > MOST_EXPERTS:
            raise ModelLoadError(
                f"model config: {self.num_layers} layers of {self.experts.count} experts; "
                f"at most {MOST_EXPERTS} in all are supported"
            )
        some = {"full_attention_layers": self.full_attention_layers, "no_rope_layers": self.no_rope_layers}
        if self.experts is not None:
            some["dense_layers"] = self.experts.dense_layers
        for name, layers in some.items():
            if layers and (list(layers) != sorted({*layers}) or layers[0] < 0 or layers[-1] >= self.num_layers):
                raise ModelLoadError(
                    f"model config: {name} are {list(layers)}; they must be ascending numbers of {self.num_layers} "
                    "layers"
                )

    def _check_rope(self) -> None:
        rotated = self.rotated
        if rotated % 2 or not 0 < rotated <= self.head_dim:
            raise ModelLoadError(
                f"model config: head_dim is {self.head_dim}, of which RoPE turns {rotated} values; it needs an even "
                f"number up to {self.head_dim}"
            )
        scaling = self.rope_scaling
        for factors in (scaling.factors, scaling.long_factors) if scaling else ():
            needed = scaling.kind == "longrope" if scaling else False
            if (factors or needed) and len(factors) != rotated // 2:
                raise ModelLoadError(
                    f"model config: {len(factors)} RoPE factors for {rotated} rotated values of head_dim "
                    f"{self.head_dim}, expected {rotated // 2}"
                )

    def _check_multipliers(self) -> None:
        names = ("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logit_multiplier")
        for name in (*names, "gate_limit", "gate_slope", "attention_soft_cap", "logit_soft_cap"):
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ModelLoadError(f"model config: {name} is {value}, must be a positive number")

    @property
    def rotated(self) -> int:
        """How many values of a head RoPE turns."""
        return self.head_dim if self.rotary_dim is None else self.rotary_dim

    def mlp_width(self, layer: int) -> int:
        """Width of what a token goes through in that layer's MLP, or in its experts together."""
        if self.experts is None or not self.has_experts(layer):
            return self.intermediate_size
        return self.experts.used * self.experts.intermediate_size

    def has_experts(self, layer: int) -> bool:
        """Whether that layer has a mixture of experts."""
        return self.experts is not None and layer not in self.experts.dense_layers

    @property
    def long_after(self) -> int | None:
        """Most tokens of a sequence that RoPE turns by factors for short ones (longrope); None: there are no others."""
        scaling = self.rope_scaling
        return scaling.original_max_position if scaling is not None and scaling.kind == "longrope" else None

    @property
    def attention_scale(self) -> float:
        """What the logits of attention are multiplied by."""
        return float(self.head_dim) ** -0.5 if self.attention_multiplier is None else self.attention_multiplier

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The layers by how far back they attend: first those that attend to all, and then those with a window."""
        everything = range(self.num_layers)
        full = everything if self.sliding_window is None else self.full_attention_layers
        groups = (
            LayerGroup(tuple(full), None),
            LayerGroup(tuple(layer for layer in everything if layer not in full), self.sliding_window),
        )
        return tuple(group for group in groups if group.layers)

    def of_shard(self, shards: int) -> ModelConfig:
        """The model that each of so many devices computes: some of the heads, and a part of the MLP's width. Where
        there are fewer KV heads than devices, each has one, as have others. The rest is told by `sharding`."""
        return dataclasses.replace(
            self,
            num_heads=self.num_heads // shards,
            num_kv_heads=max(1, self.num_kv_heads // shards),
            intermediate_size=max(1, self.intermediate_size // shards),
        )

    def with_rope_of(self, group: LayerGroup) -> ModelConfig:
        """The same with the RoPE of the group's layers as that of all."""
        if group.window is None or self.local_rope_theta is None:
            return self
        return dataclasses.replace(self, rope_theta=self.local_rope_theta, rope_scaling=None, local_rope_theta=None)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output widths of q, k and v in the fused projection."""
        return (self.num_heads * self.head_dim, *(2 * (self.num_kv_heads * self.head_dim,)))

    @property
    def qk_norm_sizes(self) -> tuple[int, int]:
        """Over how many values q and k are normalised."""
        return self.qkv_sizes[:2] if self.qk_norm_across_heads else (self.head_dim, self.head_dim)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`; raises ModelLoadError when a field is unknown or missing."""
        values = dict(values)
        try:
            if scaling := values.get("rope_scaling"):
                lists = {name: tuple(scaling.get(name, ())) for name in ("factors", "long_factors")}
                values["rope_scaling"] = RopeScaling(**{**scaling, **lists})
            if experts := values.get("experts"):
                values["experts"] = ExpertsConfig(**{**experts, "dense_layers": tuple(experts["dense_layers"])})
            for name in ("full_attention_layers", "no_rope_layers"):
                values[name] = tuple(values.get(name, ()))
            return cls(**values)
        except TypeError as error:
            raise ModelLoadError(f"stored model config does not fit this version: {error}") from error
