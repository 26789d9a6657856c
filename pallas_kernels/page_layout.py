"""A layer of a page as it lies in the arena, made of its words and taken apart into them, in XLA."""

import math

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import (
    Codec,
    EncodedVectors,
    Granularity,
    KVFormat,
    PackedLanes,
    PageWords,
)
from fineserve_jax.pallas_kernels.geometry import PageGeometry


def lay_out(words: PageWords, kv_format: KVFormat, geometry: PageGeometry) -> jax.Array:
    """The units of layers of pages, from words of [a, b, heads, ...]: u16[a, b, units_per_layer, *unit_shape].

    `a` and `b` are layers and pages, or pages and layers. Padding is 0.
    """
    parts = [joined(side.words) for side in words] + [words[side].scales[i] for side, i in kv_format.scale_order()]
    flat = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in parts], axis=-1)
    units = kv_format.units_per_layer(geometry)
    flat = jnp.pad(flat, [(0, 0), (0, 0), (0, units * geometry.unit_words - flat.shape[-1])])
    return flat.reshape(*flat.shape[:2], units, *geometry.unit_shape)


def take_apart(layers: jax.Array, kv_format: KVFormat, geometry: PageGeometry) -> PageWords:
    """The inverse of `lay_out`, of u16[..., words of a layer]: words of [..., heads, ...]."""
    scales = take_scales_apart(layers, kv_format, geometry)
    starts = kv_format.block_starts(geometry)
    shapes = [(geometry.page_size, codec.vector_words(geometry)) for codec in kv_format.sides]
    blocks = [_part(layers, start, geometry, *shape) for start, shape in zip(starts, shapes, strict=True)]
    sides = zip(blocks, kv_format.sides, scales, strict=True)
    return PageWords(*(EncodedVectors(split(block, codec), own) for block, codec, own in sides))


def take_scales_apart(
    words: jax.Array, kv_format: KVFormat, geometry: PageGeometry, first: int = 0
) -> tuple[PackedLanes, PackedLanes]:
    """The scale arrays of keys and of values, u16[..., heads, ...], of u16[..., words] from word `first` on."""

    def arrays(codec: Codec, starts: tuple[int, ...]) -> PackedLanes:
        parts = zip(codec.scales, starts, codec.scale_sizes(geometry), strict=True)
        return tuple(
            _part(words, start - first, geometry, *((size, 1) if kind is Granularity.TOKEN else (1, size)))
            for kind, start, size in parts
        )

    of_keys, of_values = map(arrays, kv_format.sides, kv_format.scale_starts(geometry))
    return of_keys, of_values


def _part(words: jax.Array, start: int, geometry: PageGeometry, *shape: int) -> jax.Array:
    """What lies head after head from word `start` on: [..., heads, *shape]."""
    size = geometry.kv_heads * math.prod(shape)
    return words[..., start : start + size].reshape(*words.shape[:-1], geometry.kv_heads, *shape)


def joined(parts: PackedLanes) -> jax.Array:
    """The word parts of vectors, one after the other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def split(vectors: jax.Array, codec: Codec) -> PackedLanes:
    """The inverse of `joined`."""
    return tuple(jnp.split(vectors, codec.word_parts, axis=-1))
