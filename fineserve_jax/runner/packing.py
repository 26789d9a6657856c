"""One transfer to the device: a tree of small arrays as one array of 32-bit words, taken apart there."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

WORD = np.dtype(np.int32)


class Packed(NamedTuple):
    """Arrays of a tree, one behind the other.

    Attributes:
        words: i32[words].
        layout: of each array the shape and dtype; static.
        tree: what they are leaves of; static.
    """

    words: np.ndarray
    layout: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]
    tree: jax.tree_util.PyTreeDef


def pack(tree: Any) -> Packed:
    """A tree of numpy arrays of 32-bit numbers, or of bools, which take a word each.

    Raises:
        TypeError: an array of something else.
    """
    leaves, structure = jax.tree.flatten(tree)
    parts = [_words(leaf) for leaf in leaves]
    layout = tuple((leaf.shape, leaf.dtype) for leaf in leaves)
    return Packed(np.concatenate(parts) if parts else np.zeros(0, WORD), layout, structure)


def unpack(
    words: jax.Array, layout: Sequence[tuple[tuple[int, ...], np.dtype[Any]]], tree: jax.tree_util.PyTreeDef
) -> Any:
    """The tree that was packed, on the device; to be jitted with `layout` and `tree` static."""
    leaves, first = [], 0
    for shape, dtype in layout:
        size = math.prod(shape)
        own = lax.slice(words, (first,), (first + size,)).reshape(shape)
        leaves.append(own != 0 if dtype == np.bool_ else lax.bitcast_convert_type(own, jnp.dtype(dtype)))
        first += size
    return jax.tree.unflatten(tree, leaves)


def _words(leaf: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(leaf).reshape(-1)
    if flat.dtype == np.bool_:
        return flat.astype(WORD)
    if flat.dtype.itemsize != WORD.itemsize:
        raise TypeError(f"an array of {flat.dtype} does not go into 32-bit words; give one of 32-bit numbers or bools")
    return flat.view(WORD)
