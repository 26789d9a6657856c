"""Small batches on which the traffic of writing is counted: what has to be written (and read) of pages, and what is."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.batches import held_bytes, padding_bytes
from benchmarks.aot.results import Bytes
from benchmarks.aot.traffic import count_traffic
from fineserve_jax.pallas_kernels import KVFormat, PageGeometry, WriteSpec, requantize, write_pages, write_tokens
from fineserve_jax.pallas_kernels.implementation import Implementation

PAGES = 2  # of each format


def encode_and_write_tokens(
    spec: WriteSpec,
    arena: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    format_ids: jax.Array,
) -> jax.Array:
    """One new token, k and v of [layers, kv_heads, N, head_dim], for each of N rows."""
    return write_tokens(spec, arena, spec.encode_tokens(k, v), pages, offsets, format_ids)


def encode_and_write_pages(
    spec: WriteSpec, arena: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, format_ids: jax.Array
) -> jax.Array:
    """Whole pages, k and v of [layers, kv_heads, pages, T, head_dim]."""
    return write_pages(spec, arena, spec.encode_pages(k, v), pages, format_ids)


@dataclass(frozen=True)
class WriteBatch:
    """New tokens, or whole pages, of one layer: two in each format."""

    implementation: Implementation
    formats: tuple[KVFormat, ...]
    geometry: PageGeometry
    whole_pages: bool

    def count(self) -> Bytes:
        """What is written (and, where that is so, read) of the arena, against what the tokens take."""
        geometry = dataclasses.replace(self.geometry, num_layers=1)
        pages, num_units = _lay_out(self.formats, geometry)
        format_ids = np.repeat(np.arange(len(self.formats), dtype=np.int32), PAGES)
        tokens = (len(pages), geometry.page_size) if self.whole_pages else (len(pages),)
        vectors = jax.ShapeDtypeStruct((1, geometry.kv_heads, *tokens, geometry.head_dim), jnp.bfloat16)
        spec = WriteSpec(geometry, self.formats, self.implementation, interpret=False)
        if self.whole_pages:
            function, indices = functools.partial(encode_and_write_pages, spec), [pages, format_ids]
        else:
            offsets = np.full(len(pages), 3, np.int32)
            function, indices = functools.partial(encode_and_write_tokens, spec), [pages, offsets, format_ids]
        count = geometry.page_size if self.whole_pages else 1
        must = PAGES * sum(held_bytes(kv_format, geometry, count) for kv_format in self.formats)
        padding = sum(padding_bytes(kv_format, geometry, PAGES) for kv_format in self.formats)
        return _count(function, geometry, num_units, [vectors, vectors, *indices], must, padding * self.whole_pages)


@dataclass(frozen=True)
class RequantizeBatch:
    """Two pages of one layer that change format."""

    implementation: Implementation
    source: KVFormat
    target: KVFormat
    geometry: PageGeometry

    def count(self) -> Bytes:
        """What is read and written of the arena, against what the pages hold."""
        geometry = dataclasses.replace(self.geometry, num_layers=1)
        both = (self.source, self.target)
        pages, num_units = _lay_out(both, geometry)
        spec = WriteSpec(geometry, both, self.implementation, interpret=False)
        function = functools.partial(requantize, spec, *both)
        must = PAGES * sum(held_bytes(kv_format, geometry, geometry.page_size) for kv_format in both)
        padding = sum(padding_bytes(kv_format, geometry, PAGES) for kv_format in both)
        arguments = [pages[:PAGES], pages[PAGES:], np.int32(PAGES)]
        return _count(function, geometry, num_units, arguments, must, padding)


def _lay_out(formats: Sequence[KVFormat], geometry: PageGeometry) -> tuple[np.ndarray, int]:
    """First units i32 of pages of each format in turn, one behind the other; and the arena's units."""
    sizes = [kv_format.page_units(geometry) for kv_format in formats for _ in range(PAGES)]
    ends = np.cumsum([1, *sizes])
    return ends[:-1].astype(np.int32), int(ends[-1])


def _count(
    function: Callable[..., Any],
    geometry: PageGeometry,
    num_units: int,
    arguments: Sequence[Any],
    must: int,
    padding: int,
) -> Bytes:
    arena = jax.ShapeDtypeStruct((num_units, *geometry.unit_shape), jnp.uint16)
    moved = other = 0
    for kernel in count_traffic(function, arena, *arguments):
        for operand in kernel.operands:
            if operand.dtype == np.uint16 and operand.size == num_units * geometry.unit_words:
                moved += operand.read + operand.written
            else:
                other += operand.read + operand.written
    return Bytes(must, padding, moved, other)
