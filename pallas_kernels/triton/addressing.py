"""Where words lie, seen from inside a Triton kernel, and storing and loading them there."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store

LEAST_COLUMNS = 16  # what a product on tensor cores contracts at least

Ref = Any


def powers_of_two(size: int) -> Iterator[tuple[int, int]]:
    """Cuts [0, size) into runs whose lengths are powers of two, the only ones that Triton has: start and length."""
    start = 0
    while start < size:
        length = 1 << (size - start).bit_length() - 1
        yield start, length
        start += length


def padded(size: int, least: int = LEAST_COLUMNS) -> int:
    """The next power of two, `least` or more."""
    return max(least, 1 << (size - 1).bit_length())


def at(ref: Ref, *indices: jax.Array | int) -> Ref:
    """The elements of `ref` that the indices name, broadcast against each other."""
    return ref.at[tuple(jnp.broadcast_arrays(*indices))]


def words_at(arena: Ref, first_unit: jax.Array, words: jax.Array) -> Ref:
    """The words `words`, counted from where unit `first_unit` begins.

    By unit and word, two indices, because their product may take more than 32 bits. Pallas then computes in 64.
    """
    unit_words = arena.shape[1]
    return at(arena, first_unit + lax.div(words, unit_words), lax.rem(words, unit_words))


def store_words(arena: Ref, first_unit: jax.Array, words: jax.Array, values: jax.Array) -> None:
    """Stores u16 `values` at `words`, i32 of the same shape, counted from where unit `first_unit` begins."""
    store(words_at(arena, first_unit, words), values)


def load_words(arena: Ref, first_unit: jax.Array, words: jax.Array) -> jax.Array:
    """Loads what lies at `words`, counted from where unit `first_unit` begins."""
    return load(words_at(arena, first_unit, words))


def clear_padding(arena: Ref, first_unit: jax.Array, kv_format: KVFormat, geometry: PageGeometry) -> None:
    """Stores 0 behind the last word of a page's layer, so that a page's bits depend on nothing but its content."""
    end = kv_format.words_per_layer(geometry)
    for start, length in powers_of_two(kv_format.units_per_layer(geometry) * geometry.unit_words - end):
        words = end + start + lax.broadcasted_iota(jnp.int32, (length,), 0)
        store_words(arena, first_unit, words, jnp.zeros(length, jnp.uint16))
