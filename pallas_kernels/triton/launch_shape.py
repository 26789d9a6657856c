"""How a launch of the Triton attention kernel is cut, and the tables that its programs read."""

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp

from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.triton.addressing import padded
from fineserve_jax.pallas_kernels.triton.tiling import TILING

# Chosen by what ptxas makes of them for sm_90a and sm_80: no spills and, decoding at head size 128, 128 registers a
# thread at most. With three stages both page ids and pages are on their way while a chunk is multiplied; where products
# take longer than loads, or padding takes registers, two are enough.
MAX_ROWS = 32  # queries x query heads that a program attends from
CHUNK_VALUES, MAX_TOKENS = 32 * 128, 32  # of keys, and as many of values, that a program multiplies at a time
LEAST = 16  # rows and tokens
DECODE_STAGES, STAGES = 3, 2
LOAD_WORDS, THREADS = 8, 32  # of 128 bits, and of a warp

Ref = Any


class Tables(NamedTuple):
    """Refs to what `Tiles` says of each tile and query block."""

    segment_slots: Ref
    pages: Ref
    num_tokens: Ref
    positions: Ref
    format_ids: Ref
    query_starts: Ref
    query_counts: Ref
    query_positions: Ref
    layer: Ref


@dataclass(frozen=True)
class LaunchShape:
    """The sizes of a launch.

    Attributes:
        queries: query tokens of a query block.
        group: query heads of a KV head.
        rows: of a query block's queries x group rows, those of a program, padded.
        pages, tokens: of a chunk, pages and tokens of each.
        warps, stages: of a program.
    """

    queries: int
    group: int
    rows: int
    pages: int
    tokens: int
    warps: int
    stages: int

    @property
    def row_blocks(self) -> int:
        return -(-self.queries * self.group // self.rows)

    @property
    def chunk(self) -> int:
        """Tokens of a chunk."""
        return self.pages * self.tokens

    def for_words(self, columns: int, parts: int, page_size: int) -> "LaunchShape":
        """The same for vectors of `parts` times `columns` words: enough tokens for every thread to load 128 bits."""
        words = padded(columns * parts)
        chunk = max(LEAST, self.chunk // parts, LOAD_WORDS * THREADS * self.warps // words)
        tokens = min(chunk, page_size)
        return dataclasses.replace(self, pages=chunk // tokens, tokens=tokens)


def launch_shape(spec: AttentionSpec, group: int, dtype: jnp.dtype) -> LaunchShape:
    """How a launch for `group` query heads a KV head, with products at `dtype`, is cut."""
    geometry, queries = spec.geometry, TILING.shape(spec).queries
    columns = padded(geometry.head_dim)
    # Masks of padded vectors take registers, and so do operands in f32.
    plain = columns == geometry.head_dim and dtype != jnp.float32
    chunk = max(LEAST, min(MAX_TOKENS, CHUNK_VALUES // columns)) if plain else LEAST
    rows = min(MAX_ROWS, padded(queries * group)) if plain and columns > 64 else LEAST
    tokens = min(chunk, geometry.page_size)
    warps = 8 if columns > 128 else 4 if columns > 64 else 2
    stages = DECODE_STAGES if queries == 1 and plain else STAGES
    return LaunchShape(queries, group, rows, chunk // tokens, tokens, warps, stages)
