"""Paged attention over segments of mixed formats: one public operation, three implementations.

    spec = AttentionSpec(geometry, formats, ...)          static: what is compiled
    tiles = spec.plan(segments, queries)                  host, once a batch
    seen = paged_attention(spec, q, arena, tiles, layer)  device, once a layer

Decoding is the case of one query a row; a batch whose rows have any number of queries each, prefill chunks and decodes
mixed, differs only in its spec. Results are partial (`PartialAttention`): they merge with attention to other keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.spec import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.xla.attention import attend_pages as xla

__all__ = ["AttentionSpec", "paged_attention"]


def paged_attention(
    spec: AttentionSpec,
    q: jax.Array,
    arena: jax.Array,
    tiles: Tiles,
    layer: int | jax.Array,
    sinks: jax.Array | None = None,
) -> PartialAttention:
    """Attention of query tokens to the cached tokens of their rows, in one launch for all formats.

    A query sees the keys of its row's segments at positions up to its own, within the window.

    Args:
        q: f32 or bf16[num_queries, heads, head_dim], already multiplied by the softmax scale; query head h reads KV
            head h // (heads / kv_heads). Kernels take products at this precision, sums in f32; XLA both in f32.
        arena: u16[num_units, *unit_shape].
        tiles: what `spec.plan` gave.
        layer: which layer's keys and values, i32[].
        sinks: f32[heads], a logit per head that takes part in the softmax and has no value (as in gpt-oss); None: none.

    Returns:
        of f32[num_queries, heads]; `weight` is 0 where a query saw no key.
    """
    num_queries, heads, head_dim = q.shape
    grouped = q.reshape(num_queries, spec.geometry.kv_heads, -1, head_dim)
    tiles, layer = jax.tree.map(jnp.asarray, tiles), jnp.asarray(layer, jnp.int32)
    seen = _attend_pages(spec)(spec, grouped, arena, tiles, layer)
    seen = PartialAttention(*(part.reshape(num_queries, heads, *part.shape[3:]) for part in seen))
    if sinks is None:
        return seen
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), seen.peak.shape)
    return seen.merge(PartialAttention(sinks, jnp.ones_like(sinks), jnp.zeros_like(seen.total)))


def _attend_pages(spec: AttentionSpec) -> Callable[..., PartialAttention]:
    """The implementation. Kernels are imported when asked for: importing Pallas takes a second."""
    if spec.implementation == "triton":
        from fineserve_jax.pallas_kernels.triton.attention import attend_pages as triton

        return triton
    if spec.implementation == "mosaic_tpu":
        from fineserve_jax.pallas_kernels.mosaic_tpu.attention import attend_pages as mosaic

        return mosaic
    return xla
