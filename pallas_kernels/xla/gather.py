"""Reading pages of one format out of the arena."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Aux, KVFormat, PageWords, Planes
from fineserve_jax.pallas_kernels.geometry import PageGeometry


def settled(*arrays: jax.Array) -> Planes:
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
        words of u16[..., kv_heads, P, T, width], auxiliary parts of u16[..., kv_heads, P, ...].
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

    aux_row = 2 * kv_heads * block_rows
    aux_rows = -(-kv_heads * sum(kv_format.aux_sizes(geometry)) // row_words)
    index = first[..., None] + aux_row + jnp.arange(aux_rows, dtype=jnp.int32)
    aux = _take(rows, index).reshape(*pages.shape, aux_rows * row_words)
    *keys_and_values, aux = settled(values(0), values(kv_heads * block_rows), aux)
    k, v = (tuple(jnp.split(part, kv_format.word_parts, axis=-1)) for part in keys_and_values)
    return PageWords(k, v, _split_aux(aux, kv_format, geometry))


def _split_aux(aux: jax.Array, kv_format: KVFormat, geometry: PageGeometry) -> Planes:
    """u16[..., P, words] -> the auxiliary parts, u16[..., kv_heads, P, ...]."""
    parts, start = [], 0
    for kind, size in zip(kv_format.aux, kv_format.aux_sizes(geometry), strict=True):
        part = aux[..., start : start + geometry.kv_heads * size]
        part = jnp.moveaxis(part.reshape(*aux.shape[:-1], geometry.kv_heads, size), -2, -3)
        parts.append(part[..., None] if kind is Aux.TOKEN else part[..., None, :])
        start += geometry.kv_heads * size
    return tuple(parts)


def _take(rows: jax.Array, index: jax.Array) -> jax.Array:
    return rows.at[index].get(mode="promise_in_bounds")
