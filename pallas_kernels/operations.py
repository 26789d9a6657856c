"""The operations on the arena: attention to cached tokens, writing tokens and pages, changing pages' formats.

    spec = AttentionSpec(geometry, formats, ...)              static: what is compiled
    tiles = plan_attention(spec, segments, queries)           host, once a batch
    seen = paged_attention(spec, q, arena, tiles, layer)      device, once a layer

    spec = WriteSpec(geometry, formats)
    words = spec.encode_tokens(k, v)
    arena = write_tokens(spec, arena, words, pages, offsets, format_ids)

Decoding is the case of one query a row; a batch whose rows have any number of queries each, prefill chunks and decodes
mixed, differs only in its spec. Results are partial (`PartialAttention`): they merge with attention to other keys.

What writes takes the arena and returns it changed; jit it with the arena donated, and the change is in place. It
handles all layers and any number of tokens or pages. What is directed to a page at `num_units` or beyond (`NOWHERE`)
is not written, so padding needs no branch.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Float32, Int32, UInt16

from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec, WriteSpec
from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun, Tiles, plan_tiles

Arena = UInt16[Array, "num_units *unit_shape"]
Queries = Float[Array, "num_queries heads head_dim"]
Sinks = Float32[Array, " heads"]
Indices = Int32[Array, " items"]  # one for each page or token
Number = Int32[Array, ""]


def plan_attention(spec: AttentionSpec, segments: Sequence[BatchSegment], queries: Sequence[QueryRun]) -> Tiles:
    """Cuts a batch for `paged_attention`; numpy, on the host.

    Args:
        segments: the rows' cached tokens, in any order. A row's must not overlap.
        queries: of each row; decoding, row r has query r.

    Raises:
        ValueError: more segments or longer ones than the spec provides for.
    """
    shape = get_backend(spec.implementation).tiling.shape(spec)
    return plan_tiles(segments, queries, shape, spec.geometry.page_size)


def paged_attention(
    spec: AttentionSpec,
    q: Queries,
    arena: Arena,
    tiles: Tiles,
    layer: int | Number,
    sinks: Sinks | None = None,
) -> PartialAttention:
    """Attention of query tokens to the cached tokens of their rows, in one launch for all formats.

    A query sees the keys of its row's segments at positions up to its own, within the window.

    Args:
        q: f32 or bf16[num_queries, heads, head_dim], already multiplied by the softmax scale; query head h reads KV
            head h // (heads / kv_heads). Kernels take products at this precision, sums in f32; XLA both in f32.
        arena: u16[num_units, *unit_shape].
        tiles: what `plan_attention` gave.
        layer: which layer's keys and values, i32[].
        sinks: f32[heads], a logit per head that takes part in the softmax and has no value (as in gpt-oss); None: none.

    Returns:
        of f32[num_queries, heads]; `l` is 0 where a query saw no key.
    """
    num_queries, heads, head_dim = q.shape
    grouped = q.reshape(num_queries, spec.geometry.kv_heads, -1, head_dim)
    tiles, layer = jax.tree.map(jnp.asarray, tiles), jnp.asarray(layer, jnp.int32)
    seen = get_backend(spec.implementation).attend(spec, grouped, arena, tiles, layer)
    seen = PartialAttention(*(part.reshape(num_queries, heads, *part.shape[3:]) for part in seen))
    if sinks is None:
        return seen
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), seen.m.shape)
    return seen.merge(PartialAttention(sinks, jnp.ones_like(sinks), jnp.zeros_like(seen.acc)))


def write_tokens(
    spec: WriteSpec,
    arena: Arena,
    words: Mapping[int, PageWords],
    pages: Indices,
    offsets: Indices,
    format_ids: Indices,
) -> Arena:
    """Writes one new token for each of N rows, every row in its own format.

    Args:
        arena: u16[num_units, *unit_shape].
        words: of all N tokens in each format that any is written in, by format id, as `WriteSpec.encode_tokens` gives
            them: u16[layers, kv_heads, N, 1, width], scales of u16[layers, kv_heads, N, 1, 1].
        pages: i32[N], first unit of each token's page. No two tokens may go to the same place, and to the same page
            only where the backend `writes_beside`.
        offsets: i32[N], each token's place in its page.
        format_ids: i32[N], index into `spec.formats`; a token whose format is not among `words` is not written.

    Raises:
        ValueError: one of the formats encodes whole pages.
    """
    backend = get_backend(spec.implementation)
    for format_id, own_words in words.items():
        kv_format = spec.formats[format_id]
        if kv_format.residual is not None:
            raise ValueError(
                f"{kv_format.name} encodes whole pages; write new tokens in {kv_format.residual}, and full pages "
                "with write_pages or requantize"
            )
        own_pages = jnp.where(format_ids == format_id, pages, NOWHERE)
        arena = backend.write_tokens(spec, kv_format, arena, own_words, own_pages, offsets)
    return arena


def write_pages(
    spec: WriteSpec,
    arena: Arena,
    words: Mapping[int, PageWords],
    pages: Indices,
    format_ids: Indices,
) -> Arena:
    """Writes whole pages, all layers, each in its own format.

    Args:
        arena: u16[num_units, *unit_shape].
        words: of all pages in each format that any is written in, by format id, as `WriteSpec.encode_pages` gives them:
            u16[layers, kv_heads, pages, T, width], scales of u16[layers, kv_heads, pages, ...].
        pages: i32[pages], first units.
        format_ids: i32[pages], index into `spec.formats`; a page whose format is not among `words` is not written.
    """
    backend = get_backend(spec.implementation)
    for format_id, own_words in words.items():
        own_pages = jnp.where(format_ids == format_id, pages, NOWHERE)
        arena = backend.write_pages(spec, spec.formats[format_id], arena, own_words, own_pages)
    return arena


def requantize(
    spec: WriteSpec,
    source: KVFormat,
    target: KVFormat,
    arena: Arena,
    sources: Indices,
    targets: Indices,
    count: Number,
) -> Arena:
    """Reads full pages in one format and writes what they hold to other pages in another, all layers.

    Args:
        source, target: any two formats.
        arena: u16[num_units, *unit_shape].
        sources, targets: i32[N], first units. A target must not overlap any source.
        count: i32[], how many of them count.
    """
    return get_backend(spec.implementation).requantize(spec, source, target, arena, sources, targets, count)
