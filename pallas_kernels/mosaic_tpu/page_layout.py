"""A whole page as it lies in the arena, made of its words and taken apart into them, in XLA."""

import math

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import Aux, KVFormat, PageWords, Planes
from fineserve_jax.pallas_kernels.geometry import PageGeometry


def lay_out(words: PageWords, kv_format: KVFormat, geometry: PageGeometry) -> jax.Array:
    """The units of pages, u16[pages, page_units, 8, 128], from words of [pages, layers, heads, ...]; padding is 0."""
    parts = [joined(words.k), joined(words.v), *words.aux]
    flat = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)
    padding = kv_format.units_per_layer(geometry) * geometry.unit_words - flat.shape[-1]
    flat = jnp.pad(flat, [(0, 0), (0, 0), (0, padding)])
    return flat.reshape(len(flat), kv_format.page_units(geometry), *geometry.unit_shape)


def take_apart(units: jax.Array, kv_format: KVFormat, geometry: PageGeometry) -> PageWords:
    """The inverse of `lay_out`."""
    flat = units.reshape(len(units), geometry.num_layers, -1)
    heads, page_size = geometry.kv_heads, geometry.page_size

    def part(start: int, *shape: int) -> jax.Array:
        size = heads * math.prod(shape)
        return flat[..., start : start + size].reshape(*flat.shape[:2], heads, *shape)

    block, vector = kv_format.block_words(geometry), kv_format.vector_words(geometry)
    k, v = (part(start, page_size, vector) for start in (0, heads * block))
    starts, sizes = kv_format.aux_starts(geometry), kv_format.aux_sizes(geometry)
    aux = [
        part(start, size, 1) if kind is Aux.TOKEN else part(start, 1, size)
        for kind, start, size in zip(kv_format.aux, starts, sizes, strict=True)
    ]
    k_parts, v_parts = (tuple(jnp.split(each, kv_format.word_parts, axis=-1)) for each in (k, v))
    return PageWords(k_parts, v_parts, tuple(aux))


def joined(parts: Planes) -> jax.Array:
    """The word parts of vectors, one after the other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)
