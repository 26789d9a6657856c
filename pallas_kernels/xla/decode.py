"""Paged attention of one query token per row."""

import functools

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.xla.attend import attend
from fineserve_jax.pallas_kernels.xla.fold import fold_tiles, read_tile
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

    add = functools.partial(_add_tile, arena=arena, tiles=tiles, layer=layer, geometry=geometry)
    padded = fold_tiles(padded, add, q, tiles, formats)
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
    vectors, counts = read_tile(arena, tiles.pages[index], tiles.num_tokens[index], layer, kv_format, geometry)
    part = attend(q[rows], vectors, counts[..., None, :])
    part = part._replace(total=kv_format.from_basis(part.total))
    merged = PartialAttention(*(old[rows] for old in so_far)).merge(part)
    return PartialAttention(*(old.at[rows].set(new) for old, new in zip(so_far, merged, strict=True)))
