"""Writing the arena: new tokens, whole pages, and pages that change format.

All of these take the arena and return it changed; jit them with the arena donated, and the change is in place.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords, TokenFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers

PAGES_AT_A_TIME = 4


def write_tokens(
    arena: jax.Array,
    words: PageWords,
    pages: jax.Array,
    offsets: jax.Array,
    kv_format: TokenFormat,
    geometry: PageGeometry,
) -> jax.Array:
    """Writes one token into each of N pages.

    Args:
        arena: u16[num_units, unit_words].
        words: of pages of one token: k and v of u16[layers, kv_heads, N, 1, W], aux of u16[layers, N, planes * heads].
        pages: i32[N], first units; a token whose page is `num_units` or more is not written.
        offsets: i32[N], the token's place in its page.
    """
    layers, kv_heads, _, _, width = words.k.shape
    page_size = geometry.page_size
    first = pages + jnp.arange(layers, dtype=jnp.int32)[:, None] * kv_format.units_per_layer(geometry)
    heads = jnp.arange(kv_heads, dtype=jnp.int32)[:, None]
    block = kv_heads * page_size * width
    for values, start in ((words.k, 0), (words.v, block)):
        address = start + (heads * page_size + offsets) * width
        arena = _write_runs(arena, values[:, :, :, 0], first[:, None], address)
    if kv_format.aux_planes:
        rows = jnp.arange(kv_format.aux_planes * kv_heads, dtype=jnp.int32)[:, None]
        address = 2 * block + rows * page_size + offsets
        arena = _write_runs(arena, words.aux.swapaxes(1, 2)[..., None], first[:, None], address)
    return arena


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
    arena: jax.Array, words: PageWords, pages: jax.Array, kv_format: KVFormat, geometry: PageGeometry
) -> jax.Array:
    """Writes whole pages, all layers.

    Args:
        arena: u16[num_units, unit_words].
        words: k and v of u16[layers, kv_heads, pages, T, W], aux of u16[layers, pages, aux_words].
        pages: i32[pages], first units; a page at `num_units` or beyond is not written.
    """
    layers, _, count, _, _ = words.k.shape
    units_per_layer = kv_format.units_per_layer(geometry)
    blocks = [part.swapaxes(1, 2).reshape(layers, count, -1) for part in (words.k, words.v)]
    content = jnp.concatenate([*blocks, words.aux], axis=-1)
    padding = units_per_layer * geometry.unit_words - content.shape[-1]
    rows = jnp.pad(content, [(0, 0), (0, 0), (0, padding)]).reshape(layers, count, units_per_layer, -1)
    layer_starts = jnp.arange(layers, dtype=jnp.int32)[:, None, None] * units_per_layer
    units = pages[:, None] + layer_starts + jnp.arange(units_per_layer, dtype=jnp.int32)
    return arena.at[units].set(rows, mode="drop")


def requantise(
    arena: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    source_format: KVFormat,
    target_format: KVFormat,
    geometry: PageGeometry,
) -> jax.Array:
    """Reads full pages in one format and writes what they hold to other pages in another.

    Args:
        sources, targets: i32[N], first units; N is a multiple of `PAGES_AT_A_TIME`.
        count: i32[], how many of them count.
    """
    layers = jnp.arange(geometry.num_layers, dtype=jnp.int32)[:, None]

    def convert(step: jax.Array, arena: jax.Array) -> jax.Array:
        start = step * PAGES_AT_A_TIME
        source, target = (lax.dynamic_slice(pages, (start,), (PAGES_AT_A_TIME,)) for pages in (sources, targets))
        target = jnp.where(start + jnp.arange(PAGES_AT_A_TIME) < count, target, arena.shape[0])
        source = jnp.broadcast_to(source, (geometry.num_layers, PAGES_AT_A_TIME))
        words = gather_page_layers(arena, source, layers, source_format, geometry)
        vectors = [source_format.from_basis(part) for part in source_format.decode(geometry, words)]
        encoded = target_format.encode(geometry, *vectors)
        return write_pages(arena, encoded, target, target_format, geometry)

    return lax.fori_loop(0, -(-count // PAGES_AT_A_TIME), convert, arena)
