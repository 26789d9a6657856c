"""Writing the arena as XLA scatters: new tokens, whole pages, and pages that change format."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.page_layout import joined, lay_out
from fineserve_jax.pallas_kernels.specs import WriteSpec
from fineserve_jax.pallas_kernels.xla.page_gather import gather_page_layers

PAGES_AT_A_TIME = 4


def write_tokens(
    spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Writes one token into each of N pages: see `Backend.write_tokens`."""
    geometry = spec.geometry
    layers, kv_heads, *_ = words.k.words[0].shape
    first = pages + jnp.arange(layers, dtype=jnp.int32)[:, None] * kv_format.units_per_layer(geometry)
    token = jnp.arange(kv_heads, dtype=jnp.int32)[:, None] * geometry.page_size + offsets
    starts, scale_starts = kv_format.block_starts(geometry), kv_format.scale_starts(geometry)
    parts = [(joined(side.words), start) for side, start in zip(words, starts, strict=True)]
    parts += [(words[side].scales[i], scale_starts[side][i]) for side, i in kv_format.scale_order()]
    units = arena.reshape(len(arena), -1)
    for values, start in parts:
        units = _write_runs(units, values[:, :, :, 0], first[:, None], start + token * values.shape[-1])
    return units.reshape(arena.shape)


def _write_runs(arena: jax.Array, runs: jax.Array, units: jax.Array, address: jax.Array) -> jax.Array:
    """Writes u16[layers, rows, N, W] at word `address` i32[rows, N] counted from unit `units` i32[layers, 1, N]."""
    width, unit_words = runs.shape[-1], arena.shape[1]
    step = math.gcd(width, unit_words)  # a run may cross from one unit to the next
    address = address[..., None] + jnp.arange(0, width, step, dtype=jnp.int32)
    starts = jnp.stack(jnp.broadcast_arrays(units[..., None] + address // unit_words, address % unit_words), axis=-1)
    return lax.scatter(
        arena,
        starts,
        runs.reshape(*runs.shape[:-1], width // step, step),
        lax.ScatterDimensionNumbers(
            update_window_dims=(4,), inserted_window_dims=(0,), scatter_dims_to_operand_dims=(0, 1)
        ),
        mode=lax.GatherScatterMode.FILL_OR_DROP,
    )


def write_pages(
    spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array
) -> jax.Array:
    """Writes whole pages, all layers: see `Backend.write_pages`."""
    geometry, layers = spec.geometry, len(words.k.words[0])
    units_per_layer = kv_format.units_per_layer(geometry)
    layer_starts = jnp.arange(layers, dtype=jnp.int32)[:, None, None] * units_per_layer
    units = pages[:, None] + layer_starts + jnp.arange(units_per_layer, dtype=jnp.int32)
    by_page = jax.tree.map(lambda part: part.swapaxes(1, 2), words)
    return arena.at[units].set(lay_out(by_page, kv_format, geometry), mode="drop")


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
    geometry = spec.geometry
    layers = jnp.arange(geometry.num_layers, dtype=jnp.int32)[:, None]
    padding = [(0, -len(sources) % PAGES_AT_A_TIME)]
    sources, targets = jnp.pad(sources, padding), jnp.pad(targets, padding)

    def convert(step: jax.Array, arena: jax.Array) -> jax.Array:
        start = step * PAGES_AT_A_TIME
        source, target = (lax.dynamic_slice(pages, (start,), (PAGES_AT_A_TIME,)) for pages in (sources, targets))
        target = jnp.where(start + jnp.arange(PAGES_AT_A_TIME) < count, target, len(arena))
        source = jnp.broadcast_to(source, (geometry.num_layers, PAGES_AT_A_TIME))
        words = gather_page_layers(arena, source, layers, source_format, geometry)
        encoded = target_format.encode_vectors(*source_format.decode_vectors(words))
        return write_pages(spec, target_format, arena, encoded, target)

    return lax.fori_loop(0, -(-count // PAGES_AT_A_TIME), convert, arena)
