"""The devices of an engine: one, or several that compute each step together.

    each device has     its shard of the weights (`models.sharding`), and an arena of its own, which holds in every page
                        what the device's KV heads have of it
    all have the same   page numbers, a step's inputs, the residual stream, what is sampled

so the host's books are those of one device, and programs are those of one device, too: `jax.shard_map` runs each stage
of a step on every device's shards, and the model adds up what the devices have of a sum (`models.layers.sum_shards`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from fineserve_jax.errors import ConfigError
from fineserve_jax.models import ModelConfig, Params
from fineserve_jax.models.layers import SHARDS
from fineserve_jax.models.params import HostParams
from fineserve_jax.models.sharding import check_shards, param_specs, shard_of

SAME, SHARDED = PartitionSpec(), PartitionSpec(SHARDS)
"""How an array lies on the devices: the same on all, or their shards one behind the other along the first axis."""
PAGES_OF_HOST = PartitionSpec(None, SHARDS)
"""Words of pages in host memory, [pages, units of all devices, *unit_shape]."""

Specs = PartitionSpec | Callable[[Any], Any]  # of an argument, or what tells it from the argument


@dataclass(frozen=True)
class DeviceGroup:
    """The devices of one engine.

    Attributes:
        devices: at least one; all of a kind.
    """

    devices: tuple[jax.Device, ...]

    @property
    def size(self) -> int:
        return len(self.devices)

    @property
    def is_default(self) -> bool:
        """Whether it is JAX's first device, alone."""
        return self.devices == (jax.devices()[0],)

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """What programs of several devices run on; None: there is one."""
        return None if self.size == 1 else Mesh(np.array(self.devices), (SHARDS,))

    def sharding(self, spec: PartitionSpec) -> Sharding:
        """How an array lies on the devices."""
        return SingleDeviceSharding(self.devices[0]) if self.mesh is None else NamedSharding(self.mesh, spec)

    def put(self, tree: Any) -> Any:
        """Arrays of the host, the same on all devices."""
        return jax.device_put(tree, self.sharding(SAME))

    # -- weights -------------------------------------------------------------------------------------------------

    def check(self, config: ModelConfig, weights: str) -> None:
        """Raises `ConfigError` for a model that the devices cannot share."""
        check_shards(config, weights, self.size)

    def place(self, config: ModelConfig, weights: str, name: str, tree: HostParams) -> Params:
        """A part of a model's parameters, such as `layers_0`, on the devices; `models.params.Placement`."""
        if self.mesh is None:
            placed: Params = jax.device_put(tree, self.devices[0], may_alias=True)
            return placed
        parts = [
            jax.device_put(shard_of(config, weights, self.size, i, name, tree), device)
            for i, device in enumerate(self.devices)
        ]
        specs = param_specs(config, {name: parts[0]})[name]
        return dict(jax.tree.map(self._join, specs, *parts, is_leaf=lambda spec: isinstance(spec, PartitionSpec)))

    def _join(self, spec: PartitionSpec, *shards: jax.Array) -> jax.Array:
        """One array, whose shards are on the devices."""
        sharding, shape = self.sharding(spec), list(shards[0].shape)
        for axis, name in enumerate(spec):
            shape[axis] *= self.size if name == SHARDS else 1
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, list(shards))

    def place_all(self, config: ModelConfig, weights: str, params: Params) -> Params:
        """A model's parameters on the devices; the same tree if they are there.

        Raises:
            ConfigError: parameters that are divided among other devices.
        """
        leaves = jax.tree.leaves(params)
        if any(_is_divided(leaf) for leaf in leaves):
            own = jax.tree.leaves(self.shardings(config, params))
            if [leaf.sharding for leaf in leaves] == own:
                return params
            raise ConfigError(
                f"the weights were divided among the devices of another engine, and cannot be among those of this one, "
                f"{self.size} in number; give the model as load_model gives it"
            )
        if self.mesh is None and all(isinstance(leaf, jax.Array) and self._holds(leaf) for leaf in leaves):
            return params
        return {
            name: self.place(config, weights, name, jax.tree.map(np.asarray, tree)) for name, tree in params.items()
        }

    def _holds(self, array: jax.Array) -> bool:
        return array.devices() == set(self.devices)

    def shardings(self, config: ModelConfig, params: Params) -> Any:
        """How the parameters lie on the devices, a tree like theirs."""
        specs = param_specs(config, params)
        return jax.tree.map(self.sharding, specs, is_leaf=lambda spec: isinstance(spec, PartitionSpec))


def device_group(count: int, devices: Sequence[jax.Device] | None = None) -> DeviceGroup:
    """The first `count` of `devices`, all of JAX's if None. Raises `ConfigError` if there are fewer."""
    found = jax.devices() if devices is None else devices
    if len(found) < count:
        given = "JAX finds" if devices is None else "the engine was given"
        raise ConfigError(
            f"tensor_parallel={count} needs {count} devices, {given} {len(found)}; use at most {len(found)}"
        )
    return DeviceGroup(tuple(found[:count]))


def _is_divided(leaf: Any) -> bool:
    """Whether an array lies as `DeviceGroup.place` lays it on several devices."""
    return isinstance(leaf, jax.Array) and SHARDS in getattr(getattr(leaf.sharding, "mesh", None), "axis_names", ())


def per_device_bytes(array: jax.Array) -> int:
    """Bytes that each device has of an array."""
    return math.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize


def over_mesh(
    mesh: Mesh | None, function: Callable[..., Any], arguments: Sequence[Specs], result: Any
) -> Callable[..., Any]:
    """`function` of one device's shards, as a function of arrays over all devices; without a mesh `function` itself.

    Args:
        arguments: how each lies on the devices.
        result: how what is returned does, in the tree of it or of its first branches.
    """
    if mesh is None:
        return function

    def run(*given: Any) -> Any:
        specs = tuple(spec(own) if callable(spec) else spec for spec, own in zip(arguments, given, strict=True))
        return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=result, check_vma=False)(*given)

    return run


def specs_of(config: ModelConfig) -> Callable[[Mapping[str, Any]], Any]:
    """How a model's parameters, or a layer's, lie on the devices, as an argument of `over_mesh`."""
    return functools.partial(param_specs, config)
