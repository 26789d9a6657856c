"""Parameter pytrees: their shapes, and packing of a checkpoint's tensors into them.

    embed/{kernel, ...}                                        [vocab, hidden]
    layers_<i>/attn_norm/scale, mlp_norm/scale                 f32[hidden]
    layers_<i>/{attn_post_norm, mlp_post_norm}/scale           f32[hidden], with post_norms
    layers_<i>/attn/qkv/{kernel, ..., bias?}                   [(heads + 2 kv_heads) * head_dim, hidden]
    layers_<i>/attn/o/{kernel, ..., bias?}                     [hidden, heads * head_dim]
    layers_<i>/attn/{q_norm, k_norm}/scale                     f32[head_dim], with qk_norm
    layers_<i>/attn/sinks                                      f32[heads], with attention_sinks
    layers_<i>/mlp/gate_up/{kernel, ..., bias?}                [2 * intermediate, hidden]
    layers_<i>/mlp/down/{kernel, ..., bias?}                   [hidden, intermediate]
    norm/scale                                                 f32[hidden]
    lm_head/{kernel, ...}                                      [vocab, hidden], unless tied

`kernel, ...` are the arrays of the weight format (see `weight_formats.py`); a bias is f32.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.registry import build_model
from fineserve_jax.models.weight_formats import WeightFormat, weight_recipe

Params = dict[str, Any]


class TensorSource(Protocol):
    """A checkpoint, whatever its file format: tensors by Hugging Face name, in Hugging Face's layout."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, read from a header; None when there is no such tensor."""

    def read(self, name: str) -> np.ndarray:
        """The values, f32. Called from several threads."""

    def unused(self, used: Collection[str]) -> list[str]:
        """Tensors beside `used` that would change the model's numbers, by the names they have in the file."""


def abstract_params(config: ModelConfig, weights: str) -> Params:
    """The parameter tree as `jax.ShapeDtypeStruct` leaves; nothing is allocated."""
    model = build_model(config, weights)
    one = jax.ShapeDtypeStruct((1,), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    tree = jax.eval_shape(lambda k, t: model.init(k, t, t, method="declare"), key, one)
    return dict(tree["params"])


def pack_params(config: ModelConfig, weights: str, source: TensorSource) -> Params:
    """Check, fuse and encode a checkpoint's tensors; returns jax arrays in the tree of `abstract_params`.

    Layers are packed by a few threads, one layer's tensors in memory each: numpy's inner loops release the
    GIL. Raises ModelLoadError, before anything is read, for a tensor that is missing, has another shape
    than `config` says or is used by nothing, and for widths the weight format cannot store.
    """
    packer = _Packer(config, weights, source)
    packer.check()
    jobs: dict[str, Callable[[], Params]] = {
        "embed": packer.embed,
        "norm": lambda: packer.norm("model.norm.weight"),
        **{f"layers_{index}": functools.partial(packer.layer, index) for index in range(config.num_layers)},
    }
    if not config.tie_embeddings:
        jobs["lm_head"] = packer.lm_head
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        futures = {name: pool.submit(job) for name, job in jobs.items()}
        try:
            return {name: future.result() for name, future in futures.items()}
        finally:
            pool.shutdown(cancel_futures=True)


def random_params(config: ModelConfig, weights: str, seed: int = 0, scale: float = 0.05) -> Params:
    """Parameters of the right shapes, normally distributed: for tests, warm-up and benchmarks."""
    return pack_params(config, weights, _RandomSource(config, seed, scale))


def tensor_names(config: ModelConfig) -> list[str]:
    """The Hugging Face names of all tensors a checkpoint of `config` must have."""
    layer = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    layer += ["pre_feedforward_layernorm.weight", "post_feedforward_layernorm.weight"] if config.post_norms else []
    layer += [f"self_attn.{part}_proj.weight" for part in "qkvo"]
    layer += [f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")]
    layer += [f"self_attn.{part}_proj.bias" for part in "qkv"] if config.qkv_bias else []
    layer += ["self_attn.o_proj.bias"] if config.o_bias else []
    layer += [f"mlp.{part}_proj.bias" for part in ("gate", "up", "down")] if config.mlp_bias else []
    layer += ["self_attn.q_norm.weight", "self_attn.k_norm.weight"] if config.qk_norm else []
    layer += ["self_attn.sinks"] if config.attention_sinks else []
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    names += [] if config.tie_embeddings else ["lm_head.weight"]
    return names + [f"model.layers.{index}.{name}" for index in range(config.num_layers) for name in layer]


def tensor_shape(config: ModelConfig, name: str) -> tuple[int, ...]:
    """The shape `config` implies for the tensor of that Hugging Face name."""
    hidden, mlp = config.hidden_size, config.intermediate_size
    q, k, v = config.qkv_sizes
    table = {
        "embed_tokens": (config.vocab_size, hidden),
        "lm_head": (config.vocab_size, hidden),
        "q_proj": (q, hidden),
        "k_proj": (k, hidden),
        "v_proj": (v, hidden),
        "o_proj": (hidden, q),
        "q_norm": (config.head_dim,),
        "k_norm": (config.head_dim,),
        "gate_proj": (mlp, hidden),
        "up_proj": (mlp, hidden),
        "down_proj": (hidden, mlp),
    }
    part, kind = name.split(".")[-2:]
    if kind == "sinks":
        return (config.num_heads,)
    shape = table.get(part, (hidden,))  # every other tensor is a norm over the hidden size
    return shape[:1] if kind == "bias" else shape


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
                raise ModelLoadError(
                    f"tensor {name} has shape {list(shape or ())}, the model's configuration implies "
                    f"{list(expected)}; the checkpoint and its configuration do not belong together"
                )
        if left := self.source.unused(found):
            raise ModelLoadError(
                f"the checkpoint has {len(left)} tensors that nothing here uses, among them "
                f"{', '.join(ascii(name)[1:-1] for name in left[:4])}; without them the model would give other text, "
                "so it is not supported"
            )
        for inner in (self.config.hidden_size, self.config.qkv_sizes[0], self.config.intermediate_size):
            self.recipe.linear.declare(1, inner)

    def embed(self) -> Params:
        fmt = self.recipe.head if self.config.tie_embeddings else self.recipe.embedding
        return self.matrix(fmt, "model.embed_tokens.weight")

    def lm_head(self) -> Params:
        return self.matrix(self.recipe.head, "lm_head.weight")

    def layer(self, index: int) -> Params:
        prefix, cfg, fmt = f"model.layers.{index}.", self.config, self.recipe.linear
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        attn: Params = {
            "qkv": self.linear(fmt, [f"{attention}{p}_proj" for p in "qkv"], cfg.qkv_bias),
            "o": self.linear(fmt, [attention + "o_proj"], cfg.o_bias),
        }
        if cfg.qk_norm:
            attn["q_norm"] = self.norm(attention + "q_norm.weight")
            attn["k_norm"] = self.norm(attention + "k_norm.weight")
        if cfg.attention_sinks:
            attn["sinks"] = jnp.asarray(self.source.read(attention + "sinks"))
        # Llama calls what is ahead of the MLP as others do what follows attention.
        before_mlp = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
        norms = {"attn_norm": "input_layernorm", "mlp_norm": before_mlp}
        if cfg.post_norms:
            norms |= {"attn_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
        return {
            **{name: self.norm(f"{prefix}{stored}.weight") for name, stored in norms.items()},
            "attn": attn,
            "mlp": {
                "gate_up": self.linear(fmt, [mlp + "gate_proj", mlp + "up_proj"], cfg.mlp_bias),
                "down": self.linear(fmt, [mlp + "down_proj"], cfg.mlp_bias),
            },
        }

    def linear(self, fmt: WeightFormat, names: list[str], bias: bool) -> Params:
        stored = self.matrix(fmt, *[name + ".weight" for name in names])
        if bias:
            stored["bias"] = jnp.asarray(np.concatenate([self.source.read(name + ".bias") for name in names]))
        return stored

    def matrix(self, fmt: WeightFormat, *names: str) -> Params:
        parts = [self.source.read(name) for name in names]
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return {name: jnp.asarray(array) for name, array in fmt.pack(whole).items()}

    def norm(self, name: str) -> Params:
        return {"scale": jnp.asarray(self.source.read(name))}


class _RandomSource:
    """Every tensor by its own generator, so that values do not depend on the order of reading."""

    def __init__(self, config: ModelConfig, seed: int, scale: float) -> None:
        self.config, self.seed, self.scale = config, seed, scale

    def shape(self, name: str) -> tuple[int, ...]:
        return tensor_shape(self.config, name)

    def unused(self, used: Collection[str]) -> list[str]:
        return []

    def read(self, name: str) -> np.ndarray:
        values = np.random.default_rng([self.seed, *name.encode()]).standard_normal(self.shape(name), np.float32)
        return 1.0 + 0.1 * values if "norm" in name else self.scale * values
