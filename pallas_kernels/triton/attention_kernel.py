"""Paged attention in Triton: one launch for segments of all formats.

A program attends from one block of queries, all query heads of one KV head, to one tile: up to P pages of one segment.
It branches on the tile's format, walks the tokens in chunks and writes a partial softmax. Tiles of a block are merged
by a second launch (`merge`), as in flash-decoding: long rows occupy many cores, and sums have a fixed order.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, Planes
from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store
from fineserve_jax.pallas_kernels.rotations import Bases
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.triton.addressing import at, padded
from fineserve_jax.pallas_kernels.triton.merge_kernel import merge_tiles
from fineserve_jax.pallas_kernels.triton.page_reader import Chunk, PageReader
from fineserve_jax.pallas_kernels.triton.products import exact_product, pick
from fineserve_jax.pallas_kernels.triton.tiling import TILING

# Chosen by what ptxas makes of them for sm_90a and sm_80: no spills and, decoding at head size 128, 128 registers a
# thread at most. With three stages both page ids and pages are on their way while a chunk is multiplied; where products
# take longer than loads, or padding takes registers, two are enough.
MAX_ROWS = 32  # queries x query heads that a program attends from
CHUNK_VALUES, MAX_TOKENS = 32 * 128, 32  # of keys, and as many of values, that a program multiplies at a time
LEAST = 16  # rows and tokens
EXACT_LANES = 32  # of queries in f32 that are multiplied at a time
DECODE_STAGES, STAGES = 3, 2
LOAD_WORDS, THREADS = 8, 32  # of 128 bits, and of a warp

Ref = Any


class Tables(NamedTuple):
    """Refs to what `Tiles` says of each tile and block."""

    slots: Ref
    pages: Ref
    num_tokens: Ref
    positions: Ref
    format_ids: Ref
    query_slots: Ref
    query_counts: Ref
    query_positions: Ref
    layer: Ref


@dataclass(frozen=True)
class Shape:
    """The sizes of a launch.

    Attributes:
        queries: query tokens of a block.
        group: query heads of a KV head.
        rows: of a block's queries x group rows, those of a program, padded.
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

    def for_words(self, lanes: int, parts: int, page_size: int) -> "Shape":
        """The same for vectors of `parts` times `lanes` words: enough tokens for every thread to load 128 bits."""
        chunk = max(LEAST, self.chunk // parts, LOAD_WORDS * THREADS * self.warps // lanes)
        tokens = min(chunk, page_size)
        return dataclasses.replace(self, pages=chunk // tokens, tokens=tokens)


def launch_shape(spec: AttentionSpec, group: int, dtype: jnp.dtype) -> Shape:
    """How a launch for `group` query heads a KV head, with products at `dtype`, is cut."""
    geometry, queries = spec.geometry, TILING.shape(spec).queries
    lanes = padded(geometry.head_dim)
    # Masks of padded vectors take registers, and so do operands in f32.
    plain = lanes == geometry.head_dim and dtype != jnp.float32
    chunk = max(LEAST, min(MAX_TOKENS, CHUNK_VALUES // lanes)) if plain else LEAST
    rows = min(MAX_ROWS, padded(queries * group)) if plain and lanes > 64 else LEAST
    tokens = min(chunk, geometry.page_size)
    warps = 8 if lanes > 128 else 4 if lanes > 64 else 2
    stages = DECODE_STAGES if queries == 1 and plain else STAGES
    return Shape(queries, group, rows, chunk // tokens, tokens, warps, stages)


def attend_pages(
    spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """Attention of each query to its row's cached tokens: see `Backend.attend`. Tiles are of one segment each."""
    num_queries, kv_heads, group, head_dim = q.shape
    bases = Bases(spec.formats, head_dim)
    parts = _attend_tiles(spec, bases, bases.rotate(q), arena, tiles, layer)
    merged = merge_tiles(spec, bases, parts, tiles)
    total = functools.reduce(jnp.add, (bases.restore(merged.total[i], i) for i in range(len(bases))))
    heads = (num_queries, kv_heads, group)
    return PartialAttention(merged.peak.reshape(heads), merged.weight.reshape(heads), total.reshape(q.shape))


def _attend_tiles(
    spec: AttentionSpec, bases: Bases, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """What each tile adds: of f32[max_tiles, queries, heads], unwritten where there is no tile or no query."""
    _, _, kv_heads, group, head_dim = q.shape
    shape = launch_shape(spec, group, q.dtype)
    max_tiles = TILING.shape(spec).max_tiles
    rows = (max_tiles, shape.queries, kv_heads * group)
    tables = Tables(
        tiles.slots[:, 0],
        tiles.pages[:, 0],
        tiles.num_tokens[:, 0],
        tiles.positions[:, 0],
        tiles.format_ids,
        tiles.query_slots,
        tiles.query_counts,
        tiles.query_positions,
        layer,
    )
    launch = pallas_call(
        functools.partial(_kernel, spec=spec, bases=bases, shape=shape),
        grid=(max_tiles, kv_heads, shape.row_blocks),
        out_shape=[jax.ShapeDtypeStruct(dims, jnp.float32) for dims in (rows, rows, (*rows, head_dim))],
        compiler_params=triton_params(num_warps=shape.warps, num_stages=shape.stages),
        interpret=spec.interpret,
        name="paged_attention",
    )
    return PartialAttention(*launch(q, arena, tables))


def _kernel(q: Ref, arena: Ref, tables: Tables, *out: Ref, spec: AttentionSpec, bases: Bases, shape: Shape) -> None:
    tile, head, row_block = program_id(0), program_id(1), program_id(2)
    program = _Program(spec, shape, q, arena, tables, PartialAttention(*out), tile, head, row_block)
    branches: list[Callable[[], None]] = [
        functools.partial(program.for_format(kv_format).attend, kv_format, basis)
        for kv_format, basis in zip(spec.formats, bases.index, strict=True)
    ]
    lax.switch(load(tables.format_ids.at[tile]), [*branches, lambda: None])


class _State(NamedTuple):
    """A running softmax: peak, weight and what offsets of values add f32[rows]; totals, f32[rows, lanes] a plane."""

    peak: jax.Array
    weight: jax.Array
    offset: jax.Array
    totals: Planes


@dataclass(frozen=True)
class _Program:
    """One program of the launch."""

    spec: AttentionSpec
    shape: Shape
    q: Ref
    arena: Ref
    tables: Tables
    out: PartialAttention
    tile: jax.Array
    head: jax.Array
    row_block: jax.Array

    @property
    def exact(self) -> bool:
        """Whether products are of f32."""
        return self.q.dtype == jnp.float32

    def for_format(self, kv_format: KVFormat) -> "_Program":
        geometry = self.spec.geometry
        lanes = padded(kv_format.width(geometry))
        return dataclasses.replace(self, shape=self.shape.for_words(lanes, kv_format.word_parts, geometry.page_size))

    def attend(self, kv_format: KVFormat, basis: int) -> None:
        """Attends to the tile, whose format is `kv_format`."""
        reader = PageReader(kv_format, self.spec.geometry)
        shape, tables = self.shape, self.tables
        block = lax.div(load(tables.slots.at[self.tile]), self.spec.segments_per_row)
        row = self.row_block * shape.rows + lax.broadcasted_iota(jnp.int32, (shape.rows, 1), 0)
        query, member = lax.div(row, shape.group), lax.rem(row, shape.group)
        count = load(tables.query_counts.at[block])
        asks = query < count

        slot = load(tables.query_slots.at[block]) + query
        load_queries = functools.partial(self._load_queries, reader, basis, slot, member, asks)
        planes = () if self.exact else tuple(load_queries(plane, 0, reader.lanes) for plane in range(kv_format.planes))
        query_position = load(tables.query_positions.at[block]) + query
        begin, end = self._token_range(block, count)

        def multiply(keys: Planes) -> jax.Array:
            if self.exact:
                return self._multiply_in_pieces(load_queries, keys)
            return functools.reduce(jnp.add, map(self._dot_transposed, planes, keys))

        def add_chunk(chunk: jax.Array, state: _State) -> _State:
            return self._add_chunk(reader, multiply, query_position, begin, end, chunk, state)

        nothing = jnp.zeros(shape.rows, jnp.float32)
        totals = (jnp.zeros((shape.rows, reader.lanes), jnp.float32),) * kv_format.planes
        state = _State(nothing + NEGATIVE, nothing, nothing, totals)
        last = lax.div(end + (shape.chunk - 1), shape.chunk)
        state = lax.fori_loop(lax.div(begin, shape.chunk), last, add_chunk, state)
        self._store(reader, state, query, member, asks)

    def _load_queries(
        self,
        reader: PageReader,
        basis: int,
        slot: jax.Array,
        member: jax.Array,
        asks: jax.Array,
        plane: int,
        first_lane: jax.Array | int,
        lanes: int,
    ) -> jax.Array:
        """Some lanes of a plane of the queries, [rows, lanes]."""
        lane = first_lane + lax.broadcasted_iota(jnp.int32, (1, lanes), 1)
        values = at(self.q, basis, slot, self.head, member, plane * reader.width + lane)
        return load(values, mask=asks & (lane < reader.width), other=jnp.zeros((), self.q.dtype))

    def _multiply_in_pieces(self, load_queries: Callable[..., jax.Array], keys: Planes) -> jax.Array:
        """Logits in f32, for which queries would fill the registers: a loop loads some lanes of them at a time."""
        lanes = min(EXACT_LANES, keys[0].shape[1])
        count = keys[0].shape[1] // lanes
        pieces = [jnp.split(plane, count, axis=1) for plane in keys]

        def add(number: jax.Array, logits: jax.Array) -> jax.Array:
            for plane, parts in enumerate(pieces):
                queries = load_queries(plane, number * lanes, lanes)
                logits = logits + self._dot_transposed(queries, pick(parts, number))
            return logits

        return lax.fori_loop(0, count, add, jnp.zeros((self.shape.rows, len(keys[0])), jnp.float32))

    @staticmethod
    def _lanes(reader: PageReader) -> list[tuple[jax.Array, jax.Array]]:
        """Of each plane, the channels i32[1, lanes] of its lanes, and which lanes have one."""
        lane = lax.broadcasted_iota(jnp.int32, (1, reader.lanes), 1)
        return [(i * reader.width + lane, lane < reader.width) for i in range(reader.kv_format.planes)]

    def _token_range(self, block: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The first, and one past the last, of the tile's tokens that any of the program's queries can see."""
        shape, tables = self.shape, self.tables
        ahead = load(tables.query_positions.at[block]) - load(tables.positions.at[self.tile])
        first_row = self.row_block * shape.rows
        last = jnp.minimum(lax.div(first_row + (shape.rows - 1), shape.group), count - 1)
        end = jnp.minimum(load(tables.num_tokens.at[self.tile]), ahead + last + 1)
        end = jnp.where(first_row < count * shape.group, end, 0)
        if self.spec.window is None:
            return jnp.int32(0), end
        first = lax.div(first_row, shape.group)
        return jnp.maximum(ahead + first + (1 - self.spec.window), 0), end

    def _chunk(self, reader: PageReader, begin: jax.Array, end: jax.Array, index: jax.Array) -> Chunk:
        shape, page_size = self.shape, self.spec.geometry.page_size
        page = lax.div(index * shape.chunk, page_size) + lax.broadcasted_iota(jnp.int32, (shape.pages, 1, 1), 0)
        token = lax.broadcasted_iota(jnp.int32, (1, shape.tokens, 1), 1)
        if shape.tokens < page_size:
            token = token + lax.rem(index * shape.chunk, page_size)
        page_start = page * page_size
        page_counts = (page_start < end) & (page_start + page_size > begin)
        first_unit = load(at(self.tables.pages, self.tile, page), mask=page_counts, other=jnp.int32(0))
        layer = load(self.tables.layer)
        in_tile = page_start + token
        return Chunk(
            first_unit + layer * reader.kv_format.units_per_layer(self.spec.geometry),
            token,
            (in_tile >= begin) & (in_tile < end),
            page_counts,
        )

    def _add_chunk(
        self,
        reader: PageReader,
        multiply: Callable[[Planes], jax.Array],
        query_position: jax.Array,
        begin: jax.Array,
        end: jax.Array,
        index: jax.Array,
        state: _State,
    ) -> _State:
        """Adds the attention to one chunk.

        Args:
            multiply: gives the logits f32[rows, tokens] of planes of keys, [tokens, lanes].
            query_position: i32[rows, 1].
        """
        spec, size = self.spec, self.shape.chunk
        chunk = self._chunk(reader, begin, end, index)
        k, v = reader.k_words(self.arena, chunk, self.head), reader.v_words(self.arena, chunk, self.head)
        numbers = reader.kv_format.read_aux(reader.aux(self.arena, chunk, self.head))
        vectors = reader.kv_format.unpack(k, v, numbers)

        def flat(planes: Planes) -> Planes:
            shape = (*chunk.counts.shape[:2], reader.lanes)
            return tuple(jnp.broadcast_to(p, shape).reshape(size, -1).astype(self.q.dtype) for p in planes)

        def by_token(numbers: jax.Array) -> jax.Array:
            return jnp.broadcast_to(numbers, chunk.counts.shape).reshape(1, size)

        in_tile = index * size + lax.broadcasted_iota(jnp.int32, (1, size), 1)
        position = load(self.tables.positions.at[self.tile]) + in_tile
        visible = (in_tile < end) & (position <= query_position)
        if spec.window is not None:
            visible &= query_position - position < spec.window

        logits = multiply(flat(vectors.k))
        if vectors.k_scale is not None:
            logits = logits * by_token(vectors.k_scale)
        if spec.soft_cap is not None:
            logits = spec.soft_cap * jnp.tanh(logits * (1 / spec.soft_cap))
        peak = jnp.maximum(state.peak, jnp.max(jnp.where(visible, logits, NEGATIVE), axis=1))
        fade = jnp.exp(state.peak - peak)
        weights = jnp.where(visible, jnp.exp(logits - peak[:, None]), 0.0)
        weight = state.weight * fade + jnp.sum(weights, axis=1)
        offset = state.offset
        if vectors.v_offset is not None:
            offset = offset * fade + jnp.sum(weights * by_token(vectors.v_offset), axis=1)
        if vectors.v_scale is not None:
            weights = weights * by_token(vectors.v_scale)
        weights = weights.astype(self.q.dtype)
        totals = tuple(
            total * fade[:, None] + self._dot(weights, plane)
            for total, plane in zip(state.totals, flat(vectors.v), strict=True)
        )
        return _State(peak, weight, offset, totals)

    def _store(self, reader: PageReader, state: _State, query: jax.Array, member: jax.Array, asks: jax.Array) -> None:
        place = (self.tile, query, self.head * self.shape.group + member)
        store(at(self.out.peak, *place), state.peak[:, None], mask=asks)
        store(at(self.out.weight, *place), state.weight[:, None], mask=asks)
        for total, (lane, inside) in zip(state.totals, self._lanes(reader), strict=True):
            store(at(self.out.total, *place, lane), total + state.offset[:, None], mask=asks & inside)

    def _dot(self, a: jax.Array, b: jax.Array, contract_b: int = 0) -> jax.Array:
        """[m, k] by [k, n], summed in f32."""
        return lax.dot_general(
            a,
            b,
            (((1,), (contract_b,)), ((), ())),
            precision=exact_product(interpret=bool(self.spec.interpret)) if self.exact else None,
            preferred_element_type=jnp.float32,
        )

    def _dot_transposed(self, a: jax.Array, b: jax.Array) -> jax.Array:
        """[m, k] by the transpose of [n, k]."""
        return self._dot(a, b, contract_b=1)
