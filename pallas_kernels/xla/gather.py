"""Reading pages of one format out of the arena."""

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.formats.packing import settled
from fineserve_jax.pallas_kernels.geometry import PageGeometry


def gather_page_layers(
    arena: jax.Array, pages: jax.Array, layer: int | jax.Array, kv_format: KVFormat, geometry: PageGeometry
) -> PageWords:
    """One layer of the given pages, as words, heads before pages.

    The indices are built in the order of the result, so that no transpose follows the gather.

    Args:
        arena: u16[num_units, unit_words].
        pages: i32[..., P], first units.
        layer: which layer; an array must broadcast against `pages`.

    Returns:
        words with k and v of u16[..., kv_heads, P, T, W] and aux of u16[..., P, aux_words].
    """
    kv_heads, width = geometry.kv_heads, kv_format.vector_words(geometry)
    head_units = geometry.page_size * width // geometry.unit_words
    first = pages + layer * kv_format.units_per_layer(geometry)

    def values(offset: int) -> jax.Array:
        head_starts = offset + head_units * jnp.arange(kv_heads, dtype=jnp.int32)
        units = first[..., None, :, None] + head_starts[:, None, None] + jnp.arange(head_units, dtype=jnp.int32)
        return _take(arena, units).reshape(*units.shape[:-1], geometry.page_size, width)

    aux_start = 2 * kv_heads * head_units
    aux_units = kv_format.units_per_layer(geometry) - aux_start
    units = first[..., None] + aux_start + jnp.arange(aux_units, dtype=jnp.int32)
    aux = _take(arena, units).reshape(*pages.shape, aux_units * geometry.unit_words)
    aux = aux[..., : kv_format.aux_words(geometry)]
    return PageWords(*settled(values(0), values(kv_heads * head_units), aux))


def _take(arena: jax.Array, units: jax.Array) -> jax.Array:
    return arena.at[units].get(mode="promise_in_bounds")
