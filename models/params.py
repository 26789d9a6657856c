"""Parameter pytrees: their shapes, and packing of a checkpoint's tensors into them.

    embed/{kernel, ...}                                        [vocab, hidden]
    layers_<i>/{attn_norm, mlp_norm}/scale                     f32[hidden], with pre_norms
    layers_<i>/{attn_post_norm, mlp_post_norm}/scale           f32[hidden], with post_norms
    layers_<i>/attn/qkv/{kernel, ..., bias?}                   [(heads + 2 kv_heads) * head_dim, hidden]
    layers_<i>/attn/o/{kernel, ..., bias?}                     [hidden, heads * head_dim]
    layers_<i>/attn/{q_norm, k_norm}/scale                     f32[head_dim] or f32[heads * head_dim], with qk_norm
    layers_<i>/attn/sinks                                      f32[heads], with attention_sinks
    layers_<i>/mlp/gate_up/{kernel, ..., bias?}                [2 * intermediate, hidden]
    layers_<i>/mlp/down/{kernel, ..., bias?}                   [hidden, intermediate]
    layers_<i>/mlp/router/{kernel, bias?}                      f32[experts, hidden], in layers with experts, whose
    layers_<i>/mlp/{gate_up, down}                             have [experts] in front
    norm/scale                                                 f32[hidden]
    lm_head/{kernel, ...}                                      [vocab, hidden], unless tied

`kernel, ...` are the arrays of the weight format (see `weight_formats.py`); a bias is f32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.registry import build_model
from fineserve_jax.models.row_packing import LatestOfThread, aligned_empty, pack_rows, to_device, together
from fineserve_jax.models.weight_formats import Float32Weights, WeightFormat, weight_recipe

Params = dict[str, Any]
HostParams = dict[str, Any]  # the same with numpy arrays


class Placement(Protocol):
    """Where parameters go, see `pack_params`."""

    def check(self, config: ModelConfig, weights: str) -> None:
        """Raises ConfigError for a model whose parameters cannot go there."""

    def place(self, config: ModelConfig, weights: str, name: str, tree: HostParams) -> Params:
        """A part of the tree, `layers_0` or another of its first names, whose arrays are the host's, as jax arrays."""


class DefaultDevice:
    """JAX's default device, where that is the host in the same memory if possible."""

    def check(self, config: ModelConfig, weights: str) -> None:
        """Any model can go there."""

    def place(self, config: ModelConfig, weights: str, name: str, tree: HostParams) -> Params:
        placed: Params = jax.tree.map(to_device, tree)
        return placed


DEFAULT_DEVICE = DefaultDevice()


class TensorSource(Protocol):
    """A checkpoint, whatever its file format: tensors by Hugging Face name, in Hugging Face's layout."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, read from a header; None when there is no such tensor."""

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """The values, f32, or those of these rows: neighbours, of q and k whole heads. Called from several threads."""

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used` that would change the model's numbers, by the names they have in the file."""


@functools.lru_cache(maxsize=16)
def abstract_params(config: ModelConfig, weights: str) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; nothing is allocated. To be read only: it is kept."""
    model = build_model(config, weights)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(lambda k, t: model.init(k, t, t, method="declare"), key, one)
    return dict(tree["params"])


def pack_params(
    config: ModelConfig, weights: str, source: TensorSource, placement: Placement = DEFAULT_DEVICE
) -> Params:
    """Check, fuse and encode a checkpoint's tensors; returns jax arrays in the tree of `abstract_params`.

    Layers are packed by a few threads, a few rows of a matrix in memory as float32 each: numpy's inner loops release
    the GIL. Each goes where `placement` says before the thread takes the next, so that the host never has to hold them
    all. Raises ModelLoadError, before anything is read, for a tensor that is missing, has another shape
    than `config` says or is used by nothing, and for widths the weight format cannot store; what `placement` refuses
    raises ConfigError.
    """
    placement.check(config, weights)
    packer = _Packer(config, weights, source)
    packer.check()
    jobs: dict[str, Callable[[], HostParams]] = {
        "embed": packer.embed,
        "norm": lambda: packer.norm("model.norm.weight"),
        **{f"layers_{index}": functools.partial(packer.layer, index) for index in range(config.num_layers)},
    }
    if not config.tie_embeddings:
        jobs["lm_head"] = packer.lm_head

    def placed(name: str, job: Callable[[], HostParams]) -> Params:
        return placement.place(config, weights, name, job())

    return together({name: functools.partial(placed, name, job) for name, job in jobs.items()})


def random_params(config: ModelConfig, weights: str, seed: int = 0, scale: float = 0.05) -> Params:
    """Parameters of the right shapes, normally distributed: for tests, warm-up and benchmarks."""
    return pack_params(config, weights, _RandomSource(config, seed, scale))


def tensor_names(config: ModelConfig) -> list[str]:
    """The names of all tensors a checkpoint of `config` must have: as in Llama's Hugging Face checkpoints."""
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.tie_embeddings else ["lm_head.weight"]
    for index in range(config.num_layers):
        parts = _norm_names(config) + _attention_names(config) + _mlp_names(config, index)
        names += [f"model.layers.{index}.{part}" for part in parts]
    return names


def _norm_names(config: ModelConfig) -> list[str]:
    """Norms of the residual stream. The one ahead of the MLP has two names: Llama calls it as others do what follows
    attention."""
    before_mlp = "pre_feedforward_layernorm" if config.post_norms else "post_attention_layernorm"
    names = ["input_layernorm"] if config.pre_norms else []
    names += [before_mlp] if config.pre_norms and not config.parallel else []
    names += ["post_attention_layernorm", "post_feedforward_layernorm"] if config.post_norms else []
    return [name + ".weight" for name in names]


def _attention_names(config: ModelConfig) -> list[str]:
    names = [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    names += [f"self_attn.{part}_proj.bias" for part in "qkv"] if config.qkv_bias else []
    names += ["self_attn.o_proj.bias"] if config.o_bias else []
    names += ["self_attn.sinks"] if config.attention_sinks else []
    return names + (["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if config.qk_norm else [])


def _mlp_names(config: ModelConfig, layer: int) -> list[str]:
    kinds = ("weight", "bias") if config.mlp_bias else ("weight",)
    projections = [f"{part}_proj.{kind}" for part in ("gate", "up", "down") for kind in kinds]
    if config.experts is None or not config.has_experts(layer):
        return ["mlp." + name for name in projections]
    router = ["mlp.gate.weight"] + (["mlp.gate.bias"] if config.experts.router_bias else [])
    return router + [f"mlp.experts.{e}.{name}" for e in range(config.experts.count) for name in projections]


def tensor_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape `config` implies for the tensor of that name."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    if config.experts is not None and ".experts." in name:
        mlp = config.experts.intermediate_size
    q, k, v = config.qkv_sizes
    q_norm, k_norm = config.qk_norm_sizes
    table = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (q, hidden),
        "k_proj": (k, hidden),
        "v_proj": (v, hidden),
        "o_proj": (hidden, q),
        "q_norm": (q_norm,),
        "k_norm": (k_norm,),
        "gate": (config.experts.count if config.experts else 0, hidden),
        "gate_proj": (mlp, hidden),
        "up_proj": (mlp, hidden),
        "down_proj": (hidden, mlp),
    }
    part, kind = name.split(".")[-2:]
    if kind == "sinks":
        return (config.num_heads,)
    shape = table.get(part, (hidden,))  # every other tensor is a norm over the hidden size
    return shape[:1] if kind == "bias" else shape


def shape_mismatch(name: str, found: tuple[int, ...] | None, expected: tuple[int, ...]) -> ModelLoadError:
    """What is said of a tensor whose shape is not what the configuration implies."""
    return ModelLoadError(
        f"tensor {name} has shape {list(found or ())}, the model's configuration implies {list(expected)}; "
        "the checkpoint and its configuration do not belong together"
    )


class _Packer:
    """Encodes the pieces of the tree."""

    def __init__(self, config: ModelConfig, weights: str, source: TensorSource) -> None:
        self.config, self.recipe, self.source = config, weight_recipe(weights), source

    def check(self) -> None:
        """Raises ModelLoadError when the source does not have exactly the tensors `config` implies."""
        found = {name: self.source.shape(name) for name in tensor_names(self.config)}
        missing = [name for name, shape in found.items() if shape is None]
        if missing:
            raise ModelLoadError(
                f"the checkpoint lacks {len(missing)} of {len(found)} tensors, first {missing[0]}; "
                "it is incomplete, or of another architecture than its configuration says"
            )
        for name, shape in found.items():
            if shape != (expected := tensor_shape(self.config, name)):
                raise shape_mismatch(name, shape, expected)
        if left := self.source.unused(found):
            raise ModelLoadError(
                f"the checkpoint has {len(left)} tensors that nothing here uses, among them "
                f"{', '.join(ascii(name)[1:-1] for name in left[:4])}; without them the model would give other text, "
                "so it is not supported"
            )
        for name in found:
            if len(shape := tensor_shape(self.config, name)) == 2:
                self.recipe.linear.declare(1, shape[1])

    def embed(self) -> HostParams:
        fmt = self.recipe.head if self.config.tie_embeddings else self.recipe.embedding
        return self.matrix(fmt, "model.embed_tokens.weight")

    def lm_head(self) -> HostParams:
        return self.matrix(self.recipe.head, "lm_head.weight")

    def layer(self, index: int) -> HostParams:
        prefix, cfg, fmt = f"model.layers.{index}.", self.config, self.recipe.linear
        attention = prefix + "self_attn."
        attn: HostParams = {
            "qkv": self.linear(fmt, [f"{attention}{p}_proj" for p in "qkv"], cfg.qkv_bias),
            "o": self.linear(fmt, [attention + "o_proj"], cfg.o_bias),
        }
        if cfg.qk_norm:
            attn["q_norm"] = self.norm(attention + "q_norm.weight")
            attn["k_norm"] = self.norm(attention + "k_norm.weight")
        if cfg.attention_sinks:
            attn["sinks"] = self.source.read(attention + "sinks")
        mlp = self.experts(prefix + "mlp.") if cfg.has_experts(index) else self.mlp(prefix + "mlp.")
        return {"attn": attn, "mlp": mlp, **self.residual_norms(prefix)}

    def residual_norms(self, prefix: str) -> HostParams:
        cfg = self.config
        names = {"attn_norm": "input_layernorm"} if cfg.pre_norms else {}
        if cfg.pre_norms and not cfg.parallel:
            names["mlp_norm"] = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
        if cfg.post_norms:
            names |= {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
        return {key: self.norm(f"{prefix}{name}.weight") for key, name in names.items()}

    def mlp(self, prefix: str) -> HostParams:
        fmt, bias = self.recipe.linear, self.config.mlp_bias
        return {
            "gate_up": self.linear(fmt, [prefix + "gate_proj", prefix + "up_proj"], bias),
            "down": self.linear(fmt, [prefix + "down_proj"], bias),
        }

    def experts(self, prefix: str) -> HostParams:
        assert self.config.experts is not None, "only models with experts have such layers"
        router_bias = self.config.experts.router_bias
        return {
            "router": self.linear(Float32Weights(), [prefix + "gate"], router_bias),
            "gate_up": self.stack(prefix, ["gate_proj", "up_proj"]),
            "down": self.stack(prefix, ["down_proj"]),
        }

    def stack(self, prefix: str, parts: list[str]) -> HostParams:
        """A matrix of every expert, encoded expert by expert, and their biases."""
        assert self.config.experts is not None, "only models with experts have such layers"
        count, fmt, stacked = self.config.experts.count, self.recipe.linear, dict[str, np.ndarray]()
        for expert in range(count):
            names = [f"{prefix}experts.{expert}.{part}" for part in parts]
            for key, array in self.linear(fmt, names, self.config.mlp_bias).items():
                if expert == 0:
                    stacked[key] = aligned_empty((count, *array.shape), array.dtype)
                stacked[key][expert] = array
        return stacked

    def linear(self, fmt: WeightFormat, names: list[str], bias: bool) -> dict[str, np.ndarray]:
        """The matrices of these names as one, encoded, and their biases."""
        shapes = [(name, tensor_shape(self.config, name)) for name in (f"{name}.weight" for name in names)]
        stored = pack_rows(fmt, self.source, shapes, unit=self.config.head_dim)
        return {**stored, "bias": np.concatenate([self.source.read(n + ".bias") for n in names])} if bias else stored

    def matrix(self, fmt: WeightFormat, name: str) -> HostParams:
        return pack_rows(fmt, self.source, [(name, tensor_shape(self.config, name))])

    def norm(self, name: str) -> HostParams:
        return {"scale": self.source.read(name)}


class _RandomSource:
    """Every tensor by its own generator, so that values do not depend on the order of reading."""

    def __init__(self, config: ModelConfig, seed: int, scale: float) -> None:
        self.config, self.seed, self.scale = config, seed, scale
        self._latest = LatestOfThread()

    def shape(self, name: str) -> tuple[int, ...]:
        return tensor_shape(self.config, name)

    def unused(self, used: Collection[str]) -> list[str]:
        return []

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        values = self._latest.get(name, lambda: self._values(name))
        return values if rows is None else values[rows]

    def _values(self, name: str) -> np.ndarray:
        values = np.random.default_rng([self.seed, *name.encode()]).standard_normal(self.shape(name), np.float32)
        return 1.0 + 0.1 * values if "norm" in name else self.scale * values
