"""How a model is divided among devices that compute it together: which part of each parameter a device has.

    qkv                     the rows of its query heads, and of the KV heads that these read
    o                       the columns of its query heads
    gate_up, down           the rows, and the columns, of its part of the MLP's width
    of a mixture            all of its experts' matrices; the router is everybody's
    embed, lm_head          the rows of its part of the vocabulary
    norms, other biases     everybody's

So a layer has two sums over the devices: what `o` gives, and what `down` gives (arXiv 1909.08053). Where there are
fewer KV heads than devices, some devices have the same one.

A parameter is one array over all devices, whose shards lie one behind the other along an axis: that of its
`PartitionSpec` here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import PartitionSpec

from fineserve_jax.errors import ConfigError, ModelLoadError
from fineserve_jax.models.layers import SHARDS
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.params import HostParams
from fineserve_jax.models.registry import get_family
from fineserve_jax.models.transformer import CausalLM
from fineserve_jax.models.weight_formats import weight_recipe

ROWS, COLUMNS, WHOLE = PartitionSpec(SHARDS), PartitionSpec(None, SHARDS), PartitionSpec()
TABLES = ("embed", "lm_head")


def check_shards(config: ModelConfig, weights: str, shards: int) -> None:
    """Raises `ConfigError` for a model that so many devices cannot share, saying how many can."""
    if (reason := _obstacle(config, weights, shards)) is None:
        return
    possible = [str(n) for n in range(1, config.num_heads + 1) if _obstacle(config, weights, n) is None]
    raise ConfigError(f"tensor_parallel={shards}: {reason}; use one of tensor_parallel={', '.join(possible)}")


def _obstacle(config: ModelConfig, weights: str, shards: int) -> str | None:
    """Why so many devices cannot share the model; None: they can."""
    if shards == 1:
        return None
    if get_family(config.family).module is not CausalLM:
        return f"the model family {config.family!r} has a computation of its own, which is not divided"
    kv_heads, experts, has_mlp = config.num_kv_heads, config.experts, not all(map(config.has_experts, _layers(config)))
    if config.num_heads % shards:
        return f"the model has {config.num_heads} query heads, which {shards} devices cannot share evenly"
    if kv_heads % shards and shards % kv_heads:
        return f"the model has {kv_heads} KV heads, which {shards} devices can neither divide nor repeat evenly"
    if has_mlp and config.intermediate_size % shards:
        return f"the model's MLP is {config.intermediate_size} wide, which {shards} devices cannot share evenly"
    if experts is not None and experts.count % shards:
        return f"the model has {experts.count} experts, which {shards} devices cannot share evenly"
    try:
        for width in (config.qkv_sizes[0], *((config.intermediate_size,) if has_mlp else ())):
            weight_recipe(weights).linear.declare(1, width // shards)
    except ModelLoadError as error:
        return f"{error} (of each device's shard)"
    return None


def _layers(config: ModelConfig) -> range:
    return range(config.num_layers)


def param_specs(config: ModelConfig, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of each array of a parameter tree, or of a layer's, along which axis it is divided."""
    return {name: _specs(config, name, part) for name, part in tree.items()}


def _specs(config: ModelConfig, name: str, part: Any) -> Any:
    if not isinstance(part, Mapping):
        return ROWS if name == "sinks" else WHOLE
    if name in ("qkv", "gate_up", *TABLES) or (name in ("q_norm", "k_norm") and config.qk_norm_across_heads):
        return dict.fromkeys(part, ROWS)
    if name == "down" and part["kernel"].ndim == 3:  # of experts
        return dict.fromkeys(part, ROWS)
    if name in ("o", "down"):
        return {key: COLUMNS if len(array.shape) == 2 else WHOLE for key, array in part.items()}
    return param_specs(config, part)


def shard_of(config: ModelConfig, weights: str, shards: int, shard: int, name: str, tree: HostParams) -> HostParams:
    """A device's part of a part of the parameter tree, such as `layers_0`; numpy arrays both."""
    return _Shard(config, weights, shards, shard).of_part(name, tree)


class _Shard:
    """Takes what one device has out of a model's parameters."""

    def __init__(self, config: ModelConfig, weights: str, shards: int, shard: int) -> None:
        self.config, self.format, self.shards, self.shard = config, weight_recipe(weights).linear, shards, shard
        heads, kv_heads = config.num_heads, config.num_kv_heads
        own_kv = max(1, kv_heads // shards)
        first_kv = shard * kv_heads // shards
        width = config.head_dim
        self.query_rows = self._own(heads * width)
        self.kv_rows = slice(first_kv * width, (first_kv + own_kv) * width)

    def _own(self, size: int) -> slice:
        """This device's part of an axis."""
        return slice(self.shard * size // self.shards, (self.shard + 1) * size // self.shards)

    def of_part(self, name: str, part: Any) -> Any:
        cfg = self.config
        if name in TABLES:
            return {key: self._table(array) for key, array in part.items()}
        if name == "qkv":
            q, k, _ = cfg.qkv_sizes
            return _take(part, [self.query_rows, _behind(q, self.kv_rows), _behind(q + k, self.kv_rows)])
        if name == "sinks":
            return part[self._own(cfg.num_heads)]
        if name in ("q_norm", "k_norm") and cfg.qk_norm_across_heads:
            return _take(part, [self.query_rows if name == "q_norm" else self.kv_rows])
        if name in ("gate_up", "down") and part["kernel"].ndim == 3:  # of experts
            return _take(part, [self._own(len(part["kernel"]))])
        if name == "gate_up":
            own = self._own(cfg.intermediate_size)
            return _take(part, [own, _behind(cfg.intermediate_size, own)])
        if name in ("o", "down"):
            columns = self.query_rows if name == "o" else self._own(cfg.intermediate_size)
            stored = {key: array for key, array in part.items() if key != "bias"}
            bias = {key: array for key, array in part.items() if key == "bias"}
            return self.format.columns(stored, columns) | bias
        return {key: self.of_part(key, own) for key, own in part.items()} if isinstance(part, Mapping) else part

    def _table(self, array: np.ndarray) -> np.ndarray:
        """Of a table of the vocabulary, whose last rows are padding."""
        rows = -(-self.config.vocab_size // self.shards)
        own = array[self.shard * rows : (self.shard + 1) * rows]
        return np.pad(own, [(0, rows - len(own)), *[(0, 0)] * (own.ndim - 1)])


def _behind(first: int, rows: slice) -> slice:
    return slice(first + rows.start, first + rows.stop)


def _take(arrays: Mapping[str, np.ndarray], rows: Sequence[slice]) -> HostParams:
    """Of each array some runs of its rows."""
    return {key: np.concatenate([array[part] for part in rows]) for key, array in arrays.items()}
