"""Encoding a parameter tree whose matrices are floats, as a trainer has it, in the weight format of another."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.models.model_config import ModelConfig
from fineserve_jax.models.params import Params, abstract_params
from fineserve_jax.models.row_packing import pack_rows, to_device, together
from fineserve_jax.models.weight_formats import WeightFormat, weight_recipe


def pack_tree(config: ModelConfig, weights: str, tree: Mapping[str, Any]) -> Params:
    """The parameters of `abstract_params(config, weights)` with the values of another tree.

    Args:
        tree: either that tree itself, of the same dtypes, whose arrays are copied; or the tree of
            `abstract_params(config, "fp32")`, of any float dtypes, whose matrices are encoded. A matrix is the same,
            whether it is encoded here or when a checkpoint is loaded, as all formats encode row by row.

    Raises:
        ModelLoadError: a tree of another structure, or arrays of other shapes, naming the first difference.
    """
    wanted = abstract_params(config, weights)
    own = {path: (leaf.shape, leaf.dtype) for path, leaf in _leaves(wanted)}
    given = {path: (leaf.shape, leaf.dtype) for path, leaf in _leaves(tree)}
    if own == given:
        copied: Params = jax.tree.map(lambda leaf: jax.device_put(leaf, may_alias=False), dict(tree))
        return copied
    _check(dict(_leaves(abstract_params(config, "fp32"))), dict(_leaves(tree)))
    recipe = weight_recipe(weights)
    table = recipe.head if config.tie_embeddings else recipe.embedding
    formats = {"embed": table, "lm_head": recipe.head}
    return together(
        {name: functools.partial(_pack, part, formats.get(name, recipe.linear)) for name, part in tree.items()}
    )


def _pack(part: Any, fmt: WeightFormat, name: str = "") -> Any:
    """A subtree with its matrices in the format; a router's, and whatever is no matrix, stays f32."""
    if not isinstance(part, Mapping):
        return to_device(_floats(part))
    if "kernel" not in part or name == "router":
        return {key: _pack(value, fmt, key) for key, value in part.items()}
    kernel = np.asarray(part["kernel"])
    if kernel.ndim == 2:
        stored = pack_rows(fmt, _Matrix(kernel), [("", kernel.shape)])
    else:  # of experts
        packed = [fmt.pack(_floats(matrix)) for matrix in kernel]
        stored = {key: np.stack([one[key] for one in packed]) for key in packed[0]}
    others = {key: _floats(value) for key, value in part.items() if key != "kernel"}
    return {key: to_device(np.ascontiguousarray(array)) for key, array in (stored | others).items()}


class _Matrix:
    """A matrix of floats on the host, as `pack_rows` reads it."""

    def __init__(self, matrix: np.ndarray) -> None:
        self._matrix = matrix

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        return self._matrix[rows or slice(None)].astype(np.float32, copy=False)


def _floats(array: Any) -> np.ndarray:
    """A copy in f32."""
    return np.array(array, np.float32)


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [("/".join(str(getattr(key, "key", key)) for key in path), leaf) for path, leaf in flat]


def _check(wanted: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Raises `ModelLoadError` unless both have the same leaves, of the same shapes, and those given are floats."""
    for path in [*wanted, *given]:
        if (path in wanted) != (path in given):
            what = "lacks" if path in wanted else "has, beside what the model has,"
            raise ModelLoadError(f"the tree {what} {path!r}; give the tree of the model's parameters")
        expected, found = wanted[path], given[path]
        if np.shape(found) != expected.shape or not jnp.issubdtype(found.dtype, jnp.floating):
            raise ModelLoadError(
                f"{path!r} is {found.dtype}{list(np.shape(found))}; floats of shape {list(expected.shape)} are wanted, "
                "or the tree as it is served"
            )
