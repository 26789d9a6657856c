"""Paged attention of one query token per row."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.xla.attend import attend, flatten_pages
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers
from fineserve_jax.pallas_kernels.xla.tiles import Tiles


def extend_over_pages(
    so_far: PartialAttention,
    q: jax.Array,
    arena: jax.Array,
    tiles: Tiles,
    layer: int | jax.Array,
    formats: tuple[KVFormat, ...],
    geometry: PageGeometry,
) -> PartialAttention:
    """Adds every row's cached tokens to its attention so far.

    Args:
        so_far: of f32[rows, kv_heads, group].
        q: f32[rows, kv_heads, group, head_dim], already multiplied by the softmax scale.
        arena: u16[num_units, unit_words].
        tiles: the rows' cached tokens; tiles of S segments by P pages.
        formats: what the tiles' format ids mean.
    """
    # One more row takes what the tiles' empty slots compute.
    padded = PartialAttention(*(jnp.pad(part, [(0, 1)] + [(0, 0)] * (part.ndim - 1)) for part in so_far))
    q = jnp.pad(q, [(0, 1), (0, 0), (0, 0), (0, 0)])

    for format_id, kv_format in enumerate(formats):
        add = functools.partial(
            _add_tile,
            q=kv_format.to_basis(q),
            arena=arena,
            tiles=tiles,
            layer=layer,
            kv_format=kv_format,
            geometry=geometry,
        )
        padded = lax.fori_loop(tiles.starts[format_id], tiles.starts[format_id + 1], add, padded)
    return PartialAttention(*(part[:-1] for part in padded))


def _add_tile(
    index: jax.Array,
    so_far: PartialAttention,
    *,
    q: jax.Array,
    arena: jax.Array,
    tiles: Tiles,
    layer: int | jax.Array,
    kv_format: KVFormat,
    geometry: PageGeometry,
) -> PartialAttention:
    """Adds one tile's tokens to the attention of its rows. `q` is in the format's basis."""
    rows = tiles.rows[index]
    words = gather_page_layers(arena, tiles.pages[index], layer, kv_format, geometry)
    tile_tokens = tiles.pages.shape[-1] * geometry.page_size
    counts = (jnp.arange(tile_tokens) < tiles.num_tokens[index][:, None])[:, None]
    part = attend(q[rows], flatten_pages(kv_format.unpack(geometry, words), counts), counts[..., None, :])
    part = part._replace(total=kv_format.from_basis(part.total))
    merged = PartialAttention(*(old[rows] for old in so_far)).merge(part)
    return PartialAttention(*(old.at[rows].set(new) for old, new in zip(so_far, merged, strict=True)))
