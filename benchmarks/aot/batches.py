"""Small batches on which traffic is counted: what the rows' pages and tables hold against what kernels move."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.aot.launches import KernelTraffic
from benchmarks.aot.results import Bytes
from benchmarks.aot.traffic import count_traffic
from fineserve_jax.pallas_kernels import AttentionSpec, BatchSegment, KVFormat, PageGeometry, QueryRun
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.formats import Granularity
from fineserve_jax.pallas_kernels.operations import paged_attention, plan_attention

# Cached tokens of a row of each format: many pages, and a last one that is partly filled. A format alone gets two rows.
LENGTHS = (1021, 765)
MOST_HEADS = 2  # KV heads of a batch for a GPU, where heads are programs, all alike
# New tokens of a row of a ragged batch. Few enough for one program: for many, kernels may read pages more than once.
NEW_TOKENS = 4


@dataclass(frozen=True)
class AttentionBatch:
    """Rows of each of a spec's formats, in one layer; queries of `dtype`."""

    spec: AttentionSpec
    heads: int
    dtype: Any = jnp.bfloat16

    def count(self) -> Bytes:
        """What attention on this batch moves."""
        full = self.spec
        geometry = dataclasses.replace(full.geometry, num_layers=1)
        heads = self.heads
        if full.implementation == "triton":
            geometry = dataclasses.replace(geometry, kv_heads=min(MOST_HEADS, full.geometry.kv_heads))
            heads = self.heads // full.geometry.kv_heads * geometry.kv_heads
        lengths = LENGTHS if len(full.formats) == 1 else LENGTHS[:1]
        num_rows = len(lengths) * len(full.formats)
        spec = dataclasses.replace(
            full,
            geometry=geometry,
            num_rows=num_rows,
            max_pages=-(-max(lengths) // geometry.page_size),
            num_queries=None if full.decodes else num_rows * NEW_TOKENS,
            segments_per_row=1,
        )
        new = 1 if full.decodes else NEW_TOKENS
        segments, num_units = _segments(spec, lengths)
        queries = [QueryRun(s.row * new, new, s.num_tokens) for s in segments]
        tiles = plan_attention(spec, segments, queries)
        q = jax.ShapeDtypeStruct((num_rows * new, heads, geometry.head_dim), self.dtype)
        arena = jax.ShapeDtypeStruct((num_units, *geometry.unit_shape), jnp.uint16)
        kernels = count_traffic(functools.partial(paged_attention, spec), q, arena, tiles, np.int32(0))
        num_tiles = int(np.sum(tiles.format_ids < len(spec.formats)))
        tables = 4 * (int(np.sum(-(-tiles.num_tokens // geometry.page_size))) + 4 * num_tiles + 3 * num_rows)
        held = sum(held_bytes(spec.formats[s.format_id], geometry, s.num_tokens) for s in segments)
        padding = sum(padding_bytes(spec.formats[s.format_id], geometry, len(s.pages)) for s in segments)
        whole_units = get_backend(spec.implementation).tile_units
        moved, other = _sort_traffic(kernels, num_units * geometry.unit_words)
        return Bytes(held + tables, padding if whole_units else 0, moved, other)


def _segments(spec: AttentionSpec, lengths: tuple[int, ...]) -> tuple[list[BatchSegment], int]:
    """The segments, on pages one behind the other, and the arena's units."""
    segments: list[BatchSegment] = []
    unit = 1
    for format_id, kv_format in enumerate(spec.formats):
        for length in lengths:
            size = kv_format.page_units(spec.geometry)
            num_pages = -(-length // spec.geometry.page_size)
            pages = range(unit, unit + num_pages * size, size)
            segments.append(BatchSegment(len(segments), format_id, pages, length))
            unit = pages.stop
    return segments, unit


def held_bytes(kv_format: KVFormat, geometry: PageGeometry, num_tokens: int) -> int:
    """Bytes of one layer's keys, values and scale arrays of `num_tokens` tokens, all heads."""
    num_pages = -(-num_tokens // geometry.page_size)
    words = 0
    for codec in kv_format.sides:
        words += num_tokens * codec.vector_words(geometry)
        for kind, size in zip(codec.scales, codec.scale_sizes(geometry), strict=True):
            words += num_tokens if kind is Granularity.TOKEN else num_pages * size
    return 2 * geometry.kv_heads * words


def padding_bytes(kv_format: KVFormat, geometry: PageGeometry, num_pages: int) -> int:
    """Bytes between one layer's end and the end of its last unit, in all the pages."""
    words = kv_format.units_per_layer(geometry) * geometry.unit_words - kv_format.words_per_layer(geometry)
    return 2 * num_pages * words


def _sort_traffic(kernels: list[KernelTraffic], arena_words: int) -> tuple[int, int]:
    """Bytes read of the arena and of integer tables; and all others, read or written."""
    moved = other = 0
    for kernel in kernels:
        for operand in kernel.operands:
            of_batch = (operand.dtype == np.uint16 and operand.size == arena_words) or operand.dtype == np.int32
            moved += operand.read if of_batch else 0
            other += operand.written + (0 if of_batch else operand.read)
    return moved, other
