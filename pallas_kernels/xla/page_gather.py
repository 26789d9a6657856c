"""Reading pages of one format out of the arena."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PackedLanes, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.page_layout import split, take_scales_apart


def settled(*arrays: jax.Array) -> PackedLanes:
    """The same arrays, computed once. XLA would fuse them into their use, and compute a scale again for each value."""
    return lax.optimization_barrier(arrays)


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
    kv_heads, page_size, width = geometry.kv_heads, geometry.page_size, kv_format.width(geometry)
    block_words = kv_format.block_words(geometry)
    row_words = math.gcd(block_words, geometry.unit_words)
    rows = arena.reshape(-1, row_words)
    first = (pages + layer * kv_format.units_per_layer(geometry)) * (geometry.unit_words // row_words)
    block_rows = block_words // row_words

    def values(start: int) -> jax.Array:
        heads = start + block_rows * jnp.arange(kv_heads, dtype=jnp.int32)
        index = first[..., None, :, None] + heads[:, None, None] + jnp.arange(block_rows, dtype=jnp.int32)
        return _take(rows, index).reshape(*index.shape[:-1], page_size, kv_format.word_parts * width)

    scale_row = 2 * kv_heads * block_rows
    scale_rows = -(-kv_heads * sum(kv_format.scale_sizes(geometry)) // row_words)
    index = first[..., None] + scale_row + jnp.arange(scale_rows, dtype=jnp.int32)
    scales = _take(rows, index).reshape(*pages.shape, scale_rows * row_words)
    k, v, scales = settled(values(0), values(kv_heads * block_rows), scales)
    scale_parts = (jnp.moveaxis(part, -3, -4) for part in take_scales_apart(scales, kv_format, geometry))
    return PageWords(split(k, kv_format), split(v, kv_format), tuple(scale_parts))


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    return rows.at[index].get(mode="promise_in_bounds")
