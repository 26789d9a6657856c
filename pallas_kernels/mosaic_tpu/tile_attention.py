"""Attention from a block of queries to a tile, inside the Mosaic kernel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import LANES, NOWHERE, PageRows, divide
from fineserve_jax.pallas_kernels.mosaic_tpu.launch_plan import ROW_MULTIPLE, Outputs, Ref, dot
from fineserve_jax.pallas_kernels.mosaic_tpu.page_copies import TileCopies
from fineserve_jax.pallas_kernels.mosaic_tpu.page_unpacker import PageReader
from fineserve_jax.pallas_kernels.pallas_api import ds, multiple_of
from fineserve_jax.pallas_kernels.softmax import NEGATIVE


class TileAttention:
    """Attention from a block of queries to a tile of one format."""

    def __init__(
        self, tiles: TileCopies, number: int, rows: PageRows, tile: jax.Array, q: Ref, rotations: Ref, out: Outputs
    ) -> None:
        self.tiles, self.number, self.rows, self.tile, self.out = tiles, number, rows, tile, out
        self._q, self._rotations = q, rotations
        self.launch, self.memory = tiles.launch, tiles.memory
        self.block_rows = self.launch.query_rows // rows.num_blocks  # of queries of a block of heads

    def run(self) -> None:
        tiles, memory, rows = self.tiles, self.memory, self.rows
        self._for_blocks(self._prepare)
        reader = PageReader(rows, memory.pages, memory.spare)
        tokens, ends, vectors = self._tokens(), self._visible_ends(), self._lane_vectors()

        def step_over_pages(step: jax.Array, nothing: None) -> None:
            tiles.start(self.number, self.tile, step + 1)
            tiles.wait(self.number, self.tile, step)
            before = tiles.table.tokens_before[self.tile] + step * (self.launch.pages * rows.geometry.page_size)
            num_tokens = tiles.table.num_tokens[self.tile] - before

            def attend(block: jax.Array) -> None:
                k, v = reader.read(tiles.buffer(self.tile, step), block, num_tokens)
                logits = self._logits(block, k)
                logits = jnp.where(self._visible(tokens, ends, before), logits, NEGATIVE)
                self._add(block, logits, v, vectors)

            self._for_blocks(attend)

        lax.fori_loop(0, tiles.num_steps(self.tile), step_over_pages, None)
        self._for_blocks(self._write)

    def _for_blocks(self, act: Callable[[jax.Array], None]) -> None:
        """Does something for each block of heads."""
        if self.rows.num_blocks == 1:
            act(jnp.int32(0))
        else:
            lax.fori_loop(0, self.rows.num_blocks, lambda block, nothing: act(block), None)

    def _own(self, block: jax.Array) -> Any:
        """The rows of a block's queries."""
        return ds(multiple_of(block * self.block_rows, ROW_MULTIPLE), self.block_rows)

    def _arranged(self, block: jax.Array, plane: int, vector: int | jax.Array = 0) -> jax.Array:
        """Where the block's queries begin that are arranged as a plane of this vector of a group."""
        index = ((block * self.rows.num_planes + plane) * self.rows.sharing + vector) * self.block_rows
        return multiple_of(index, ROW_MULTIPLE)

    # -- before the loop -----------------------------------------------------------------------------------------

    def _prepare(self, block: jax.Array) -> None:
        """Lays the queries out as vectors lie in rows, 0 in the lanes of a group's others, and empties the totals."""
        rows, launch, memory, own = self.rows, self.launch, self.memory, self._own(block)
        q, in_lanes = self._q[0, own], []
        basis = launch.bases[self.number]
        if basis is not None:
            q = dot(q.astype(jnp.float32), self._rotations[basis], lax.Precision.HIGHEST).astype(launch.dtype)
        for index, (phase, plane) in enumerate(self._planes()):
            memory.total[index, own] = jnp.zeros((self.block_rows, LANES), jnp.float32)
            in_lanes.append(launch.dot(q, rows.plane_lanes(phase, plane, launch.dtype)))

        def arrange(vector: int | jax.Array, nothing: None = None) -> None:
            for index, (lanes, (phase, _)) in enumerate(zip(in_lanes, self._planes(), strict=True)):
                if rows.sharing > 1:
                    lanes = jnp.where(rows.lane_vector(phase, (1, LANES), 1)[0] == vector, lanes, 0.0)
                memory.arranged[ds(self._arranged(block, index, vector), self.block_rows)] = lanes.astype(launch.dtype)

        if rows.sharing == 1:
            arrange(0)
        else:
            lax.fori_loop(0, rows.sharing, arrange, None)

    def _planes(self) -> list[tuple[int, int]]:
        return [(phase, plane) for phase in self.rows.phases for plane in range(self.rows.kv_format.planes)]

    def _tokens(self) -> jax.Array:
        """The token among a step's that each logit is of, i32[sharing * block_rows, groups]; NOWHERE across heads."""
        head, token = self.rows.columns()
        own = divide(lax.broadcasted_iota(jnp.int32, (self.block_rows, 1), 0), self.launch.group * self.launch.queries)
        vectors = range(self.rows.sharing)
        return jnp.concatenate([jnp.where(head[b : b + 1] == own, token[b : b + 1], NOWHERE) for b in vectors])

    def _visible_ends(self) -> tuple[jax.Array, jax.Array]:
        """Of each row of logits, the first token of the tile that its query sees, and the first behind these."""
        launch, table = self.launch, self.tiles.table
        row = lax.broadcasted_iota(jnp.int32, (self.rows.sharing * self.block_rows, 1), 0)
        query = row - divide(row, launch.queries) * launch.queries
        last = query + table.offsets[self.tile]
        first = last - launch.window + 1 if launch.window is not None else jnp.zeros_like(last)
        return first, jnp.minimum(last + 1, table.num_tokens[self.tile])

    def _lane_vectors(self) -> list[jax.Array]:
        """Of each plane, which vector of a group each lane belongs to, i32[1, 1, 128]."""
        return [self.rows.lane_vector(phase, (1, LANES), 1)[0][None] for phase, _ in self._planes()]

    # -- in the loop ---------------------------------------------------------------------------------------------

    def _logits(self, block: jax.Array, k: tuple[jax.Array, ...]) -> jax.Array:
        """f32[sharing * block_rows, groups]; across heads they mean nothing."""
        count = self.rows.sharing * self.block_rows
        logits = jnp.zeros((count, self.rows.groups), jnp.float32)
        for index, plane in enumerate(k):
            q = self.memory.arranged[ds(self._arranged(block, index), count)]
            logits += self.launch.dot(q, plane, transposed=True)
        if self.launch.soft_cap is None:
            return logits
        return self.launch.soft_cap * jnp.tanh(logits / self.launch.soft_cap)

    def _visible(self, tokens: jax.Array, ends: tuple[jax.Array, jax.Array], before: jax.Array) -> jax.Array:
        first, end = ends
        visible = tokens < end - before
        return visible if self.launch.window is None else visible & (tokens >= first - before)

    def _add(self, block: jax.Array, logits: jax.Array, v: tuple[jax.Array, ...], vectors: list[jax.Array]) -> None:
        """Adds a step's tokens to the softmax sums."""
        memory, sharing, count, own = self.memory, self.rows.sharing, self.block_rows, self._own(block)
        logits = logits.reshape(sharing, count, -1)
        before = memory.peak[own, :1]
        peak = jnp.maximum(before, jnp.max(jnp.max(logits, axis=0), axis=-1, keepdims=True))
        # Where no key was seen yet, exp(NEGATIVE - peak) must be 0, not 1.
        base = jnp.maximum(peak, NEGATIVE / 2)
        fade, weights = jnp.exp(before - base), jnp.exp(logits - base[None])
        added = jnp.sum(jnp.sum(weights, axis=0), axis=-1, keepdims=True)
        memory.peak[own] = jnp.broadcast_to(peak, (count, LANES))
        memory.weight[own] = memory.weight[own] * fade + added
        weights = weights.reshape(sharing * count, -1)
        for index, (plane, vector) in enumerate(zip(v, vectors, strict=True)):
            total = self.launch.dot(weights, plane).reshape(sharing, count, LANES)
            if sharing > 1:
                place = lax.broadcasted_iota(jnp.int32, (sharing, 1, 1), 0)
                total = jnp.where(vector == place, total, 0.0)
            memory.total[index, own] = memory.total[index, own] * fade + jnp.sum(total, axis=0)

    # -- after the loop ------------------------------------------------------------------------------------------

    def _write(self, block: jax.Array) -> None:
        """Adds the lanes of a group's vectors, puts the planes one beside the other, and adds the tile to the block."""
        memory, out, own = self.memory, self.out, self._own(block)
        total = jnp.zeros((self.block_rows, out.total.shape[-1]), jnp.float32)
        for index, (phase, plane) in enumerate(self._planes()):
            lanes = self.rows.plane_lanes(phase, plane, jnp.float32)
            total += dot(memory.total[index, own], lanes, lax.Precision.HIGHEST, transposed=True)
        basis = self.launch.bases[self.number]
        if basis is not None:
            total = dot(total, self._rotations[basis], lax.Precision.HIGHEST, transposed=True)
        peak = memory.peak[own]
        fade = jnp.exp(out.stats[0, own, :1] - jnp.maximum(peak[:, :1], NEGATIVE / 2))
        out.total[0, own] = out.total[0, own] * fade + total
        lane = lax.broadcasted_iota(jnp.int32, (self.block_rows, LANES), 1)
        out.stats[0, own] = jnp.where(lane == 0, peak, memory.weight[own])
