"""The Triton kernel of paged attention: from one query block, all query heads of one KV head, to one tile.

A program branches on the tile's format, walks the tile's tokens in chunks and writes a partial softmax. Queries times
query heads are its rows.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PackedLanes, UnpackedVectors
from fineserve_jax.pallas_kernels.pallas_api import program_id
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store
from fineserve_jax.pallas_kernels.rotations import Rotations
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.triton.addressing import at, padded
from fineserve_jax.pallas_kernels.triton.launch_shape import LaunchShape, Tables
from fineserve_jax.pallas_kernels.triton.page_reader import Chunk, PageReader, VectorReader
from fineserve_jax.pallas_kernels.triton.products import exact_product, pick

EXACT_COLUMNS = 32  # of queries in f32 that are multiplied at a time

Ref = Any


class _RunningSoftmax(NamedTuple):
    """m, l and what zero points of values add, f32[rows]; acc of each packed lane, f32[rows, columns]."""

    m: jax.Array
    l: jax.Array
    zero_point: jax.Array
    acc: PackedLanes


class _Rows(NamedTuple):
    """A program's rows, i32[rows, 1].

    Attributes:
        query: which query of the query block each is.
        member: which query head of the KV head.
        query_index: of the query on the query axis.
        position: of the query in its sequence.
        asks: bool, whether there is such a query.
    """

    query: jax.Array
    member: jax.Array
    query_index: jax.Array
    position: jax.Array
    asks: jax.Array


def attention_kernel(
    q: Ref, arena: Ref, tables: Tables, *out: Ref, spec: AttentionSpec, rotations: Rotations, shape: LaunchShape
) -> None:
    """One program: tile, KV head and block of rows are its places in the grid. `q` is [rotations, ...], of
    keys."""
    tile, head, row_block = program_id(0), program_id(1), program_id(2)
    program = _Program(spec, shape, q, arena, tables, PartialAttention(*out), tile, head, row_block)
    branches: list[Callable[[], None]] = [
        functools.partial(program.for_format(kv_format).attend, kv_format, rotation)
        for kv_format, rotation in zip(spec.formats, rotations.of_codec, strict=True)
    ]
    lax.switch(load(tables.format_ids.at[tile]), [*branches, lambda: None])


@dataclass(frozen=True)
class _Program:
    """One program of the launch."""

    spec: AttentionSpec
    shape: LaunchShape
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
        columns = min(padded(codec.width(geometry)) for codec in kv_format.sides)
        parts = max(codec.word_parts for codec in kv_format.sides)
        return dataclasses.replace(self, shape=self.shape.for_words(columns, parts, geometry.page_size))

    def attend(self, kv_format: KVFormat, rotation: int) -> None:
        """Attends to the tile, whose format is `kv_format`."""
        reader, shape, tables = PageReader(kv_format, self.spec.geometry), self.shape, self.tables
        block = lax.div(load(tables.segment_slots.at[self.tile]), self.spec.segments_per_row)
        row = self.row_block * shape.rows + lax.broadcasted_iota(jnp.int32, (shape.rows, 1), 0)
        query, member = lax.div(row, shape.group), lax.rem(row, shape.group)
        count = load(tables.query_counts.at[block])
        query_index = load(tables.query_starts.at[block]) + query
        rows = _Rows(query, member, query_index, load(tables.query_positions.at[block]) + query, query < count)
        multiply = self._multiplier(reader.keys, rotation, rows)
        begin, end = self._token_range(block, count)

        def add_chunk(index: jax.Array, state: _RunningSoftmax) -> _RunningSoftmax:
            return self._add_chunk(reader, multiply, rows, begin, end, index, state)

        nothing = jnp.zeros(shape.rows, jnp.float32)
        acc = (jnp.zeros((shape.rows, reader.values.columns), jnp.float32),) * kv_format.value.packed_lanes
        state = _RunningSoftmax(nothing + NEGATIVE, nothing, nothing, acc)
        last = lax.div(end + (shape.chunk - 1), shape.chunk)
        state = lax.fori_loop(lax.div(begin, shape.chunk), last, add_chunk, state)
        self._store(reader.values, state, rows)

    # -- queries, and their products with keys -------------------------------------------------------------------

    def _multiplier(self, reader: VectorReader, rotation: int, rows: _Rows) -> Callable[[PackedLanes], jax.Array]:
        """What gives the logits f32[rows, tokens] of packed lanes of keys, [tokens, columns].

        Queries are loaded once, but for products of f32, for which they would fill the registers.
        """
        load_queries = functools.partial(self._load_queries, reader, rotation, rows)
        if self.exact:
            return functools.partial(self._multiply_in_pieces, load_queries)
        queries = [load_queries(lane, 0, reader.columns) for lane in range(reader.codec.packed_lanes)]
        return lambda keys: functools.reduce(jnp.add, map(self._dot_transposed, queries, keys))

    def _load_queries(
        self,
        reader: VectorReader,
        rotation: int,
        rows: _Rows,
        lane: int,
        first_column: jax.Array | int,
        columns: int,
    ) -> jax.Array:
        """Some columns of a packed lane of the queries, [rows, columns]."""
        column = first_column + lax.broadcasted_iota(jnp.int32, (1, columns), 1)
        values = at(self.q, rotation, rows.query_index, self.head, rows.member, lane * reader.width + column)
        return load(values, mask=rows.asks & (column < reader.width), other=jnp.zeros((), self.q.dtype))

    def _multiply_in_pieces(self, load_queries: Callable[..., jax.Array], keys: PackedLanes) -> jax.Array:
        """Logits in f32: a loop loads some columns of the queries at a time."""
        columns = min(EXACT_COLUMNS, keys[0].shape[1])
        count = keys[0].shape[1] // columns
        pieces = [jnp.split(lane, count, axis=1) for lane in keys]

        def add(number: jax.Array, logits: jax.Array) -> jax.Array:
            for lane, parts in enumerate(pieces):
                queries = load_queries(lane, number * columns, columns)
                logits = logits + self._dot_transposed(queries, pick(parts, number))
            return logits

        return lax.fori_loop(0, count, add, jnp.zeros((self.shape.rows, len(keys[0])), jnp.float32))

    # -- tokens --------------------------------------------------------------------------------------------------

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
        """The chunk with that number, of the tile's tokens from `begin` to `end`."""
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

    def _visible(self, query_position: jax.Array, end: jax.Array, index: jax.Array) -> jax.Array:
        """Which tokens of a chunk each row sees, bool[rows, tokens]."""
        in_tile = index * self.shape.chunk + lax.broadcasted_iota(jnp.int32, (1, self.shape.chunk), 1)
        position = load(self.tables.positions.at[self.tile]) + in_tile
        visible = (in_tile < end) & (position <= query_position)
        if self.spec.window is not None:
            visible &= query_position - position < self.spec.window
        return visible

    # -- the softmax ---------------------------------------------------------------------------------------------

    def _add_chunk(
        self,
        reader: PageReader,
        multiply: Callable[[PackedLanes], jax.Array],
        rows: _Rows,
        begin: jax.Array,
        end: jax.Array,
        index: jax.Array,
        state: _RunningSoftmax,
    ) -> _RunningSoftmax:
        """Adds the attention to one chunk."""
        chunk = self._chunk(reader, begin, end, index)
        vectors = reader.read(self.arena, chunk, self.head)
        visible = self._visible(rows.position, end, index)
        logits = multiply(reader.keys.flatten(chunk, vectors.k.lanes, self.q.dtype))
        if vectors.k.scale is not None:
            logits = logits * chunk.by_token(vectors.k.scale)
        if self.spec.soft_cap is not None:
            logits = self.spec.soft_cap * jnp.tanh(logits * (1 / self.spec.soft_cap))
        return self._accumulate(reader.values, chunk, vectors.v, visible, logits, state)

    def _accumulate(
        self,
        reader: VectorReader,
        chunk: Chunk,
        vectors: UnpackedVectors,
        visible: jax.Array,
        logits: jax.Array,
        state: _RunningSoftmax,
    ) -> _RunningSoftmax:
        m = jnp.maximum(state.m, jnp.max(jnp.where(visible, logits, NEGATIVE), axis=1))
        alpha = jnp.exp(state.m - m)
        weights = jnp.where(visible, jnp.exp(logits - m[:, None]), 0.0)
        l = state.l * alpha + jnp.sum(weights, axis=1)
        zero_point = state.zero_point
        if vectors.zero_point is not None:
            zero_point = zero_point * alpha + jnp.sum(weights * chunk.by_token(vectors.zero_point), axis=1)
        if vectors.scale is not None:
            weights = weights * chunk.by_token(vectors.scale)
        weights = weights.astype(self.q.dtype)
        values = reader.flatten(chunk, vectors.lanes, self.q.dtype)
        acc = tuple(
            old * alpha[:, None] + self._dot(weights, lane) for old, lane in zip(state.acc, values, strict=True)
        )
        return _RunningSoftmax(m, l, zero_point, acc)

    def _store(self, reader: VectorReader, state: _RunningSoftmax, rows: _Rows) -> None:
        place = (self.tile, rows.query, self.head * self.shape.group + rows.member)
        store(at(self.out.m, *place), state.m[:, None], mask=rows.asks)
        store(at(self.out.l, *place), state.l[:, None], mask=rows.asks)
        column = lax.broadcasted_iota(jnp.int32, (1, reader.columns), 1)
        channels = [(i * reader.width + column, column < reader.width) for i in range(reader.codec.packed_lanes)]
        for acc, (channel, inside) in zip(state.acc, channels, strict=True):
            store(at(self.out.acc, *place, channel), acc + state.zero_point[:, None], mask=rows.asks & inside)

    # -- products ------------------------------------------------------------------------------------------------

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
