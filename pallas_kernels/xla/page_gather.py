"""Reading pages of one format out of the arena."""

import math
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KEYS, VALUES, EncodedVectors, KVFormat, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.page_layout import split, take_scales_apart

Tree = TypeVar("Tree")


def settled(arrays: Tree) -> Tree:
    """The same arrays, computed once. XLA would fuse them into their use, and compute a scale again for each value."""
    settled_arrays: Tree = lax.optimization_barrier(arrays)
    return settled_arrays


def gather_page_layers(
    arena: jax.Array, pages: jax.Array, layer: int | jax.Array, kv_format: KVFormat, geometry: PageGeometry
) -> PageWords:
    """One layer of the given pages, as words, heads before pages.

    The indices are built in the order of the result, so that no transpose follows the gather. The arena is viewed in
    rows as long as heads' blocks allow: gathering few long rows is several times faster than many short ones.

    Args:
        arena: u16[num_units, *unit_shape].
        pages: i32[..., P], first units.
        layer: which layer; an array must broadcast against `pages`.

    Returns:
        words of u16[..., kv_heads, P, T, width], scale arrays of u16[..., kv_heads, P, ...].
    """
    kv_heads, page_size = geometry.kv_heads, geometry.page_size
    blocks = [codec.block_words(geometry) for codec in kv_format.sides]
    row_words = math.gcd(*blocks, geometry.unit_words)
    rows = arena.reshape(-1, row_words)
    first = (pages + layer * kv_format.units_per_layer(geometry)) * (geometry.unit_words // row_words)

    def vectors(side: int) -> jax.Array:
        block_rows = blocks[side] // row_words
        heads = kv_format.block_starts(geometry)[side] // row_words + block_rows * jnp.arange(kv_heads, dtype=jnp.int32)
        index = first[..., None, :, None] + heads[:, None, None] + jnp.arange(block_rows, dtype=jnp.int32)
        return _take(rows, index).reshape(*index.shape[:-1], page_size, kv_format.sides[side].vector_words(geometry))

    scale_start = kv_heads * sum(blocks)
    scale_rows = -(-(kv_format.words_per_layer(geometry) - scale_start) // row_words)
    index = first[..., None] + scale_start // row_words + jnp.arange(scale_rows, dtype=jnp.int32)
    scales = _take(rows, index).reshape(*pages.shape, scale_rows * row_words)
    k, v, scales = settled((vectors(KEYS), vectors(VALUES), scales))
    of_keys, of_values = (
        tuple(jnp.moveaxis(part, -3, -4) for part in parts)
        for parts in take_scales_apart(scales, kv_format, geometry, scale_start)
    )
    return PageWords(
        EncodedVectors(split(k, kv_format.key), of_keys), EncodedVectors(split(v, kv_format.value), of_values)
    )


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    return rows.at[index].get(mode="promise_in_bounds")
