"""Attention from a query block to a tile, inside the Mosaic kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import LANES, NOWHERE, LaneLayout, PageLayout, divide
from fineserve_jax.pallas_kernels.mosaic_tpu.launch_plan import ROW_MULTIPLE, Outputs, Ref, dot
from fineserve_jax.pallas_kernels.mosaic_tpu.page_copies import TileCopies
from fineserve_jax.pallas_kernels.mosaic_tpu.page_unpacker import VectorUnpacker
from fineserve_jax.pallas_kernels.pallas_api import ds, multiple_of
from fineserve_jax.pallas_kernels.softmax import NEGATIVE


class TileAttention:
    """Attention from a query block to a tile of one format."""

    def __init__(
        self, tiles: TileCopies, number: int, layout: PageLayout, tile: jax.Array, q: Ref, rotations: Ref, out: Outputs
    ) -> None:
        self.tiles, self.number, self.tile, self.out = tiles, number, tile, out
        self.keys, self.values = layout.sides
        self._q, self._rotations = q, rotations
        self.launch, self.memory = tiles.launch, tiles.memory
        self.block_rows = self.launch.query_rows // self.keys.num_head_blocks  # of queries of a head block

    def run(self) -> None:
        tiles, memory = self.tiles, self.memory
        self._for_head_blocks(self._prepare)
        keys, values = (VectorUnpacker(side, memory.pages, memory.spare) for side in (self.keys, self.values))
        tokens, ends, vectors = self._tokens(), self._visible_ends(), self._lane_vectors()

        def step_over_pages(step: jax.Array, nothing: None) -> None:
            tiles.start(self.number, self.tile, step + 1)
            tiles.wait(self.number, self.tile, step)
            before = tiles.table.tokens_before[self.tile] + step * (self.launch.pages * self.keys.geometry.page_size)
            num_tokens = tiles.table.num_tokens[self.tile] - before

            def attend(block: jax.Array) -> None:
                buffer = tiles.buffer(self.tile, step)
                k, v = (unpacker.read(buffer, block, num_tokens) for unpacker in (keys, values))
                logits = self._logits(block, k)
                logits = jnp.where(self._visible(tokens, ends, before), logits, NEGATIVE)
                self._add(block, logits, v, vectors)

            self._for_head_blocks(attend)

        lax.fori_loop(0, tiles.num_steps(self.tile), step_over_pages, None)
        self._for_head_blocks(self._write)

    def _for_head_blocks(self, act: Callable[[jax.Array], None]) -> None:
        """Does something for each head block."""
        if self.keys.num_head_blocks == 1:
            act(jnp.int32(0))
        else:
            lax.fori_loop(0, self.keys.num_head_blocks, lambda block, nothing: act(block), None)

    def _own(self, block: jax.Array) -> Any:
        """The rows of a head block's queries."""
        return ds(multiple_of(block * self.block_rows, ROW_MULTIPLE), self.block_rows)

    def _arranged(self, block: jax.Array, packed_lane: int, vector: int | jax.Array = 0) -> jax.Array:
        """Where the head block's queries begin that are arranged as a packed lane of this vector of a group."""
        index = ((block * self.keys.num_packed_lanes + packed_lane) * self.keys.sharing + vector) * self.block_rows
        return multiple_of(index, ROW_MULTIPLE)

    # -- before the loop -----------------------------------------------------------------------------------------

    def _prepare(self, block: jax.Array) -> None:
        """Lays the queries out as vectors lie in rows, 0 in the lanes of a group's others, and empties acc."""
        layout, launch, memory, own = self.keys, self.launch, self.memory, self._own(block)
        q, in_lanes = self._q[0, own], []
        rotation, _ = launch.rotations[self.number]
        if rotation is not None:
            q = dot(q.astype(jnp.float32), self._rotations[rotation], lax.Precision.HIGHEST).astype(launch.dtype)
        for index in range(self.values.num_packed_lanes):
            memory.acc[index, own] = jnp.zeros((self.block_rows, LANES), jnp.float32)
        for phase, packed_lane in _packed_lanes(layout):
            in_lanes.append(launch.dot(q, layout.lane_selector(phase, packed_lane, launch.dtype)))

        def arrange(vector: int | jax.Array, nothing: None = None) -> None:
            for index, (lanes, (phase, _)) in enumerate(zip(in_lanes, _packed_lanes(layout), strict=True)):
                if layout.sharing > 1:
                    lanes = jnp.where(layout.lane_vector(phase, (1, LANES), 1)[0] == vector, lanes, 0.0)
                memory.arranged[ds(self._arranged(block, index, vector), self.block_rows)] = lanes.astype(launch.dtype)

        if layout.sharing == 1:
            arrange(0)
        else:
            lax.fori_loop(0, layout.sharing, arrange, None)

    def _tokens(self) -> jax.Array:
        """The token among a step's that each logit is of, i32[sharing * block_rows, groups]; NOWHERE across heads."""
        head, token = self.keys.columns()
        own = divide(lax.broadcasted_iota(jnp.int32, (self.block_rows, 1), 0), self.launch.group * self.launch.queries)
        vectors = range(self.keys.sharing)
        return jnp.concatenate([jnp.where(head[b : b + 1] == own, token[b : b + 1], NOWHERE) for b in vectors])

    def _visible_ends(self) -> tuple[jax.Array, jax.Array]:
        """Of each row of logits, the first token of the tile that its query sees, and the first behind these."""
        launch, table = self.launch, self.tiles.table
        row = lax.broadcasted_iota(jnp.int32, (self.keys.sharing * self.block_rows, 1), 0)
        query = row - divide(row, launch.queries) * launch.queries
        last = query + table.offsets[self.tile]
        first = last - launch.window + 1 if launch.window is not None else jnp.zeros_like(last)
        return first, jnp.minimum(last + 1, table.num_tokens[self.tile])

    def _lane_vectors(self) -> list[jax.Array]:
        """Of each packed lane of values, which vector of a group each lane belongs to, i32[1, 1, 128]."""
        return [self.values.lane_vector(phase, (1, LANES), 1)[0][None] for phase, _ in _packed_lanes(self.values)]

    # -- in the loop ---------------------------------------------------------------------------------------------

    def _logits(self, block: jax.Array, k: tuple[jax.Array, ...]) -> jax.Array:
        """f32[sharing * block_rows, groups]; across heads they mean nothing."""
        count = self.keys.sharing * self.block_rows
        logits = jnp.zeros((count, self.keys.groups), jnp.float32)
        for index, packed_lane in enumerate(k):
            q = self.memory.arranged[ds(self._arranged(block, index), count)]
            logits += self.launch.dot(q, packed_lane, transposed=True)
        if self.launch.soft_cap is None:
            return logits
        return self.launch.soft_cap * jnp.tanh(logits / self.launch.soft_cap)

    def _visible(self, tokens: jax.Array, ends: tuple[jax.Array, jax.Array], before: jax.Array) -> jax.Array:
        first, end = ends
        visible = tokens < end - before
        return visible if self.launch.window is None else visible & (tokens >= first - before)

    def _add(self, block: jax.Array, logits: jax.Array, v: tuple[jax.Array, ...], vectors: list[jax.Array]) -> None:
        """Adds a step's tokens to the softmax sums."""
        memory, sharing, count, own = self.memory, self.values.sharing, self.block_rows, self._own(block)
        logits = logits.reshape(sharing, count, -1)
        before = memory.m[own, :1]
        m = jnp.maximum(before, jnp.max(jnp.max(logits, axis=0), axis=-1, keepdims=True))
        # Where no key was seen yet, exp(NEGATIVE - m) must be 0, not 1.
        base = jnp.maximum(m, NEGATIVE / 2)
        alpha, weights = jnp.exp(before - base), jnp.exp(logits - base[None])
        added = jnp.sum(jnp.sum(weights, axis=0), axis=-1, keepdims=True)
        memory.m[own] = jnp.broadcast_to(m, (count, LANES))
        memory.l[own] = memory.l[own] * alpha + added
        weights = weights.reshape(sharing * count, -1)
        for index, (packed_lane, vector) in enumerate(zip(v, vectors, strict=True)):
            acc = self.launch.dot(weights, packed_lane).reshape(sharing, count, LANES)
            if sharing > 1:
                place = lax.broadcasted_iota(jnp.int32, (sharing, 1, 1), 0)
                acc = jnp.where(vector == place, acc, 0.0)
            memory.acc[index, own] = memory.acc[index, own] * alpha + jnp.sum(acc, axis=0)

    # -- after the loop ------------------------------------------------------------------------------------------

    def _write(self, block: jax.Array) -> None:
        """Adds the lanes of a group's vectors, joins the packed lanes, and adds the tile to the query block."""
        memory, out, own = self.memory, self.out, self._own(block)
        acc = jnp.zeros((self.block_rows, out.acc.shape[-1]), jnp.float32)
        for index, (phase, packed_lane) in enumerate(_packed_lanes(self.values)):
            lanes = self.values.lane_selector(phase, packed_lane, jnp.float32)
            acc += dot(memory.acc[index, own], lanes, lax.Precision.HIGHEST, transposed=True)
        _, rotation = self.launch.rotations[self.number]
        if rotation is not None:
            acc = dot(acc, self._rotations[rotation], lax.Precision.HIGHEST, transposed=True)
        m = memory.m[own]
        alpha = jnp.exp(out.stats[0, own, :1] - jnp.maximum(m[:, :1], NEGATIVE / 2))
        out.acc[0, own] = out.acc[0, own] * alpha + acc
        lane = lax.broadcasted_iota(jnp.int32, (self.block_rows, LANES), 1)
        out.stats[0, own] = jnp.where(lane == 0, m, memory.l[own])


def _packed_lanes(layout: LaneLayout) -> list[tuple[int, int]]:
    """(Phase, packed lane) of every arrangement of lanes that values lie in."""
    return [(phase, lane) for phase in layout.phases for lane in range(layout.codec.packed_lanes)]
