"""The loop over a batch's tiles, which decoding and prefill share."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PageVectors
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.xla.attend import flatten_pages
from fineserve_jax.pallas_kernels.xla.gather import gather_page_layers
from fineserve_jax.pallas_kernels.xla.tiles import Tiles


def fold_tiles(
    so_far: PartialAttention,
    add_tile: Callable[..., PartialAttention],
    q: jax.Array,
    tiles: Tiles,
    formats: tuple[KVFormat, ...],
) -> PartialAttention:
    """Takes the attention so far through `add_tile(index, so_far, q=, kv_format=)` for every tile, format by format.

    `q` f32[..., head_dim] is in the model's basis; `add_tile` gets it in the format's.
    """
    for format_id, kv_format in enumerate(formats):
        add = functools.partial(add_tile, q=kv_format.to_basis(q), kv_format=kv_format)
        so_far = lax.fori_loop(tiles.starts[format_id], tiles.starts[format_id + 1], add, so_far)
    return so_far


def read_tile(
    arena: jax.Array,
    pages: jax.Array,
    num_tokens: jax.Array,
    layer: int | jax.Array,
    kv_format: KVFormat,
    geometry: PageGeometry,
) -> tuple[PageVectors, jax.Array]:
    """One layer of segments' pages.

    Args:
        pages: i32[..., P], first units.
        num_tokens: i32[...], the tokens of those pages that count.

    Returns:
        the vectors, pages joined, of f32[..., kv_heads, P * T, ...], and which tokens count, bool[..., 1, P * T].
    """
    words = gather_page_layers(arena, pages, layer, kv_format, geometry)
    counts = (jnp.arange(pages.shape[-1] * geometry.page_size) < num_tokens[..., None])[..., None, :]
    return flatten_pages(kv_format.unpack(geometry, words), counts), counts
