"""Attention by the compiled kernels: to pages where they lie, all formats in one call, and among a step's own tokens.

Batches are cut as for XLA, so that what has no codec can be left to XLA's loops over the same tiles.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fineserve_jax.pallas_kernels.chunk_attention import without_spreading
from fineserve_jax.pallas_kernels.cpu.codecs import has_codec, layouts, rotation_block
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.xla import attention_loop


def attend_pages(
    spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """Attention of each query to its row's cached tokens: see `Backend.attend`. Products are taken in f32."""
    others = [i for i, kv_format in enumerate(spec.formats) if not has_codec(kv_format)]
    if len(others) == len(spec.formats):
        return attention_loop.attend_pages(spec, q, arena, tiles, layer)
    seen = _attend(spec, q.astype(jnp.float32), arena, tiles, layer)
    if not others:
        return seen
    return seen.merge(attention_loop.attend_pages(spec, q, arena, tiles, layer, others))


def attend_within(
    q: jax.Array,
    own_page: tuple[jax.Array, jax.Array],
    earlier_pages: tuple[jax.Array, jax.Array],
    chunk_of_page: jax.Array,
    window: int | None = None,
    soft_cap: float | None = None,
) -> PartialAttention:
    """Causal attention of each chunk's tokens to themselves: see `chunk_attention.attend_within`."""
    results = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (q.shape[:-1], q.shape[:-1], q.shape))
    call = jax.ffi.ffi_call("fineserve_attend_within", results)
    vectors = [*without_spreading(*own_page), *without_spreading(*earlier_pages)]
    seen = call(q, *vectors, chunk_of_page, window=np.int64(window or 0), soft_cap=np.float32(soft_cap or 0.0))
    return PartialAttention(*seen)


def _attend(spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array) -> PartialAttention:
    *heads, head_dim = q.shape
    results = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (heads, heads, q.shape))
    # A row is summed in short runs where its queries alone would not keep all threads busy.
    few_queries = spec.query_axis_size <= 2 * spec.num_rows
    call = jax.ffi.ffi_call("fineserve_attend", tuple(results))
    m, l, acc = call(
        q,
        arena,
        layer,
        tiles.segment_slots,
        tiles.pages,
        tiles.num_tokens,
        tiles.positions,
        tiles.format_ids,
        tiles.query_block_tiles,
        tiles.query_starts,
        tiles.query_counts,
        tiles.query_positions,
        page_size=np.int64(spec.geometry.page_size),
        segments_per_row=np.int64(spec.segments_per_row),
        window=np.int64(spec.window or 0),
        soft_cap=np.float32(spec.soft_cap or 0.0),
        decodes=few_queries,
        rotation_block=np.int64(rotation_block(head_dim)),
        **layouts(spec.formats, spec.geometry),
    )
    return PartialAttention(m, l, acc)
