"""A layer of a page as it lies in the arena, made of its words and taken apart into them, in XLA."""

import math

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import Granularity, KVFormat, PackedLanes, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry


def lay_out(words: PageWords, kv_format: KVFormat, geometry: PageGeometry) -> jax.Array:
    """The units of layers of pages, from words of [a, b, heads, ...]: u16[a, b, units_per_layer, *unit_shape].

    `a` and `b` are layers and pages, or pages and layers. Padding is 0.
    """
    parts = [joined(words.k), joined(words.v), *words.scales]
    flat = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)
    units = kv_format.units_per_layer(geometry)
    flat = jnp.pad(flat, [(0, 0), (0, 0), (0, units * geometry.unit_words - flat.shape[-1])])
    return flat.reshape(*flat.shape[:2], units, *geometry.unit_shape)


def take_apart(layers: jax.Array, kv_format: KVFormat, geometry: PageGeometry) -> PageWords:
    """The inverse of `lay_out`, of u16[..., words of a layer]: words of [..., heads, ...]."""
    block = kv_format.block_words(geometry)
    size = geometry.kv_heads * block

    def vectors(start: int) -> PackedLanes:
        return split(_part(layers, start, geometry, geometry.page_size, block // geometry.page_size), kv_format)

    return PageWords(vectors(0), vectors(size), take_scales_apart(layers[..., 2 * size :], kv_format, geometry))


def take_scales_apart(words: jax.Array, kv_format: KVFormat, geometry: PageGeometry) -> PackedLanes:
    """The scale arrays, u16[..., heads, ...], of u16[..., words] that begin with the first of them."""
    parts, start = [], 0
    for kind, size in zip(kv_format.scales, kv_format.scale_sizes(geometry), strict=True):
        parts.append(_part(words, start, geometry, *((size, 1) if kind is Granularity.TOKEN else (1, size))))
        start += geometry.kv_heads * size
    return tuple(parts)


def _part(words: jax.Array, start: int, geometry: PageGeometry, *shape: int) -> jax.Array:
    """What lies head after head from word `start` on: [..., heads, *shape]."""
    size = geometry.kv_heads * math.prod(shape)
    return words[..., start : start + size].reshape(*words.shape[:-1], geometry.kv_heads, *shape)


def joined(parts: PackedLanes) -> jax.Array:
    """The word parts of vectors, one after the other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def split(vectors: jax.Array, kv_format: KVFormat) -> PackedLanes:
    """The inverse of `joined`."""
    return tuple(jnp.split(vectors, kv_format.word_parts, axis=-1))
