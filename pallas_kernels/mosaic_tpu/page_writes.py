"""Writing the arena on TPUs. A kernel copies whole units between the arena and arrays that XLA has laid out like it.

Pages that change format are read by one kernel, decoded and encoded again by XLA and written by another, a few at a
time: formats work on arrays of [T, width], and to bring the words of a page into that shape, which depends on every
size, is what XLA does well. The price is a few more passes over those pages' words; no other page is touched.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.page_layout import lay_out, take_apart
from fineserve_jax.pallas_kernels.pallas_api import (
    TpuDMASemaphore,
    TpuPrefetchScalarGridSpec,
    ds,
    pallas_call,
    tpu_async_copy,
    tpu_in_place,
    tpu_interpret,
    tpu_params,
    when,
)
from fineserve_jax.pallas_kernels.specs import WriteSpec

# Keys and values that change format in one step. Few, because decoded ones take memory, and programs for large arrays
# take long to compile.
VALUES_AT_A_TIME = 1 << 18

Ref = Any


def write_pages(
    spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array
) -> jax.Array:
    """Writes whole pages, all layers: see `Backend.write_pages`."""
    pages_first = jax.tree.map(lambda part: jnp.moveaxis(part, 2, 0), words)
    return _copy_into(arena, lay_out(pages_first, kv_format, spec.geometry), pages, bool(spec.interpret))


def requantize(
    spec: WriteSpec,
    source_format: KVFormat,
    target_format: KVFormat,
    arena: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Reads full pages in one format and writes what they hold to others in another: see `Backend.requantize`."""
    part, parts = _parts_of_pages(spec.geometry)
    interpret = bool(spec.interpret)
    at_a_time = min(len(sources) * parts, max(1, VALUES_AT_A_TIME // _values(part)))
    steps = -(-count * parts // at_a_time)

    def first_units(pages: jax.Array, kv_format: KVFormat) -> jax.Array:
        """Where the parts of pages begin; beyond the arena for those that do not count."""
        own = jnp.where(jnp.arange(len(pages)) < count, pages, len(arena))
        units = (own[:, None] + jnp.arange(parts) * kv_format.page_units(part)).reshape(-1)
        return jnp.pad(units, (0, -len(units) % at_a_time), constant_values=len(arena))

    source_units, target_units = first_units(sources, source_format), first_units(targets, target_format)

    def convert(step: jax.Array, arena: jax.Array) -> jax.Array:
        source, target = (
            lax.dynamic_slice(units, (step * at_a_time,), (at_a_time,)) for units in (source_units, target_units)
        )
        units = _copy_out(arena, source, source_format.page_units(part), interpret)
        layers = units.reshape(at_a_time, part.num_layers, -1)
        vectors = source_format.decode_vectors(take_apart(layers, source_format, part))
        encoded = lay_out(target_format.encode_vectors(*vectors), target_format, part)
        return _copy_into(arena, encoded, target, interpret)

    return lax.fori_loop(0, steps, convert, arena)


def _parts_of_pages(geometry: PageGeometry) -> tuple[PageGeometry, int]:
    """Pages cut into parts of some layers each, which are pages of fewer layers: their geometry, and how many."""
    layers = geometry.num_layers
    sizes = [size for size in range(1, layers + 1) if layers % size == 0]
    parts = [dataclasses.replace(geometry, num_layers=size) for size in sizes]
    part = max((part for part in parts if _values(part) <= VALUES_AT_A_TIME), key=_values, default=parts[0])
    return part, layers // part.num_layers


def _values(geometry: PageGeometry) -> int:
    """Keys and values of a page."""
    return 2 * geometry.num_layers * geometry.kv_heads * geometry.page_size * geometry.head_dim


def _copy_into(arena: jax.Array, units: jax.Array, pages: jax.Array, interpret: bool) -> jax.Array:
    """Copies u16[N, layers, units_per_layer, 8, 128] to the units from i32[N] `pages` on, if these are in the arena."""
    units = units.reshape(len(units), -1, *units.shape[3:])
    return pallas_call(
        _copy_into_kernel,
        grid_spec=_grid_spec(num_inputs=2),
        out_shape=jax.ShapeDtypeStruct(arena.shape, arena.dtype),
        input_output_aliases={2: 0},
        compiler_params=tpu_params(("arbitrary",)),
        interpret=tpu_interpret(interpret),
        name="write_pages",
    )(pages, units, arena)


def _copy_out(arena: jax.Array, pages: jax.Array, page_units: int, interpret: bool) -> jax.Array:
    """The inverse of `_copy_into`: u16[N, page_units, 8, 128]; anything for pages beyond the arena."""
    return pallas_call(
        _copy_out_kernel,
        grid_spec=_grid_spec(num_inputs=1),
        out_shape=jax.ShapeDtypeStruct((len(pages), page_units, *arena.shape[1:]), arena.dtype),
        compiler_params=tpu_params(("arbitrary",)),
        interpret=tpu_interpret(interpret),
        name="read_pages",
    )(pages, arena)


def _grid_spec(num_inputs: int) -> Any:
    """One program, with the first units of pages and, left where they are, the arrays to copy between."""
    return TpuPrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(1,),
        in_specs=[tpu_in_place()] * num_inputs,
        out_specs=tpu_in_place(),
        scratch_shapes=[TpuDMASemaphore(())],
    )


def _copy_into_kernel(pages: Ref, units: Ref, _arena_before: Ref, arena: Ref, semaphore: Ref) -> None:
    def copy(index: jax.Array) -> Any:
        return tpu_async_copy(units.at[index], arena.at[ds(pages[index], units.shape[1])], semaphore)

    _copy_all(copy, pages, arena.shape[0])


def _copy_out_kernel(pages: Ref, arena: Ref, units: Ref, semaphore: Ref) -> None:
    def copy(index: jax.Array) -> Any:
        return tpu_async_copy(arena.at[ds(pages[index], units.shape[1])], units.at[index], semaphore)

    _copy_all(copy, pages, arena.shape[0])


def _copy_all(copy: Callable[[jax.Array], Any], pages: Ref, num_units: int) -> None:
    """Starts the copies of all pages that are in the arena, then waits for them."""

    def each(act: Callable[[Any], None]) -> None:
        @functools.partial(lax.fori_loop, 0, pages.shape[0], init_val=None)
        def _(index: jax.Array, _: None) -> None:
            when(pages[index] < num_units)(lambda: act(copy(index)))

    each(lambda started: started.start())
    each(lambda started: started.wait())
