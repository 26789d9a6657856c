"""What a decoder-only model looks like: frozen, hashable, and static for `jit`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from fineserve_jax.errors import ModelLoadError

Activation = Literal["silu", "gelu_tanh"]
RopeKind = Literal["linear", "llama3", "yarn", "factors"]
ROPE_KINDS: tuple[str, ...] = ("linear", "llama3", "yarn", "factors")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    kind: `linear` divides every frequency by `factor`; `llama3` divides the slow ones and blends between
        (Llama 3.1, section "long context"); `yarn` is arXiv 2309.00071; `factors` divides frequency i by
        `factors[i]`, which is how GGUF files spell out `llama3`.
    factor: the stretch, >= 1.
    original_max_position: context length in tokens before stretching (llama3, yarn).
    low_freq_factor, high_freq_factor: llama3's band, in turns per original context.
    beta_fast, beta_slow: yarn's band, in turns per original context.
    attention_factor: yarn's multiplier of cos and sin; None derives 0.1 ln(factor) + 1.
    truncate: whether yarn rounds its band to whole dimensions.
    factors: one divisor per frequency, `head_dim / 2` of them.
    """

    kind: RopeKind
    factor: float = 1.0
    original_max_position: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in ROPE_KINDS:
            raise ModelLoadError(f"RoPE scaling {self.kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
        if self.kind in ("llama3", "yarn") and self.original_max_position <= 0:
            raise ModelLoadError(
                f"RoPE scaling {self.kind!r} needs the original context length, got "
                f"{self.original_max_position}; set original_max_position_embeddings in config.json"
            )
        self._check_numbers()

    def _check_numbers(self) -> None:
        numbers = {"factor": self.factor, "attention_factor": self.attention_factor}
        numbers |= {f"factors[{index}]": factor for index, factor in enumerate(self.factors)}
        for name, value in numbers.items():
            if value is not None and not 0.0 < value < math.inf:
                raise ModelLoadError(f"RoPE scaling {self.kind!r}: {name} is {value}, must be a positive number")
        if not 0.0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ModelLoadError(
                f"RoPE scaling {self.kind!r}: low_freq_factor {self.low_freq_factor} must be positive and less than "
                f"high_freq_factor {self.high_freq_factor}"
            )
        if not 0.0 < self.beta_slow < self.beta_fast < math.inf:
            raise ModelLoadError(
                f"RoPE scaling {self.kind!r}: beta_slow {self.beta_slow} must be positive and less than "
                f"beta_fast {self.beta_fast}"
            )


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
    qkv_bias, o_bias: whether the attention projections carry biases.
    mlp_bias: whether the projections of the MLP carry biases.
    activation: of the MLP's gates; `gelu_tanh` is GELU's approximation by tanh (Gemma).
    post_norms: whether what attention and MLP give is normalised, besides what they take (Gemma).
    qk_norm: RMSNorm over head_dim on q and k before RoPE (Qwen3).
    embedding_multiplier: of the embedded tokens.
    attention_multiplier: of the logits of attention; None: 1 / sqrt(head_dim).
    logit_soft_cap: the output head's logits are capped to cap * tanh(logit / cap); None: not.
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
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-6
    tie_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: Activation = "silu"
    post_norms: bool = False
    qk_norm: bool = False
    embedding_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logit_soft_cap: float | None = None
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
        if self.head_dim % 2:
            raise ModelLoadError(f"model config: head_dim is {self.head_dim}, RoPE needs an even number")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ModelLoadError(f"model config: sliding_window is {self.sliding_window}, must be at least 1")
        full = self.full_attention_layers
        if full and (list(full) != sorted({*full}) or full[0] < 0 or full[-1] >= self.num_layers):
            raise ModelLoadError(
                f"model config: full_attention_layers are {list(full)}; they must be ascending numbers of "
                f"{self.num_layers} layers"
            )
        names = ("embedding_multiplier", "attention_multiplier", "attention_soft_cap", "logit_soft_cap")
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0.0 < value < math.inf:
                raise ModelLoadError(f"model config: {name} is {value}, must be a positive number")
        factors = self.rope_scaling.factors if self.rope_scaling else ()
        if factors and len(factors) != self.head_dim // 2:
            raise ModelLoadError(
                f"model config: {len(factors)} RoPE factors for head_dim {self.head_dim}, expected {self.head_dim // 2}"
            )

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

    def with_rope_of(self, group: LayerGroup) -> ModelConfig:
        """The same with the RoPE of the group's layers as that of all."""
        if group.window is None or self.local_rope_theta is None:
            return self
        return dataclasses.replace(self, rope_theta=self.local_rope_theta, rope_scaling=None, local_rope_theta=None)

    @property
    def qkv_sizes(self) -> tuple[int, int, int]:
        """Output widths of q, k and v in the fused projection."""
        return (self.num_heads * self.head_dim, *(2 * (self.num_kv_heads * self.head_dim,)))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form, inverse of `from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelConfig:
        """Rebuild from `to_dict`; raises ModelLoadError when a field is unknown or missing."""
        values = dict(values)
        try:
            if scaling := values.get("rope_scaling"):
                scaling = {**scaling, "factors": tuple(scaling.get("factors", ()))}
                values["rope_scaling"] = RopeScaling(**scaling)
            values["full_attention_layers"] = tuple(values.get("full_attention_layers", ()))
            return cls(**values)
        except TypeError as error:
            raise ModelLoadError(f"stored model config does not fit this version: {error}") from error
