"""New weights for a model that is being served."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fineserve_jax.errors import ConfigError
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.loaders.named_tensors import NamedTensors
from fineserve_jax.models import Params, pack_params
from fineserve_jax.models.tree_packing import pack_tree
from fineserve_jax.runner.mesh import DeviceGroup, device_group

WeightSource = str | Path | Mapping[str, Any]
"""Where weights come from: what names a model, as `load_model` takes it; tensors by the names of Hugging Face's
checkpoints; or a tree of parameters, see `pack_tree`."""


def new_params(model: LoadedModel, source: WeightSource, group: DeviceGroup | None = None) -> Params:
    """Parameters of the same shapes and dtypes as the model's, complete.

    Args:
        group: where they go; None: JAX's default device.

    Raises:
        ModelLoadError: a source that cannot be found or read, that lacks something, or has something else.
        ConfigError: a model of another configuration, naming what differs.
    """
    group = group or device_group(1)
    if isinstance(source, Mapping):
        if any(isinstance(part, Mapping) for part in source.values()):
            packed = pack_tree(model.config, model.weights, source)
            params = group.place_all(model.config, model.weights, packed)
        else:
            params = pack_params(model.config, model.weights, NamedTensors(model.config, source), group)
    else:
        loaded = load_model(source, model.weights, group)
        _check_config(model, loaded)
        params = loaded.params
    jax.block_until_ready(params)
    return params


def _check_config(model: LoadedModel, other: LoadedModel) -> None:
    fields = (field.name for field in dataclasses.fields(model.config))
    pairs = {name: (getattr(model.config, name), getattr(other.config, name)) for name in fields}
    if differing := {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}:
        name, (own, new) = next(iter(differing.items()))
        raise ConfigError(
            f"the new weights are of a model with {name}={new!r}, {model.name!r} has {name}={own!r}; give weights of "
            "the same configuration, or make another engine"
        )
