"""From the words of pages in vector memory to keys and values, in rows of 128 lanes (see `rows`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Aux, Planes
from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import LANES, SUBLANES, TILE_WORDS, PageRows
from fineserve_jax.pallas_kernels.pallas_api import ds, tpu_roll

Ref = Any


class Phase(NamedTuple):
    """What lies where in one phase of the rows; the same for all steps over pages.

    Attributes:
        number: the phase.
        token: i32[groups, 128], the token of each word among those of the joined pages; NOWHERE where no value is.
        aux_index: of each kind of auxiliary part, i32[page_groups, 128], which number of a page's part covers a word.
    """

    number: int
    token: jax.Array
    aux_index: dict[Aux, jax.Array]


class PageReader:
    """Reads a block of heads of a few pages.

    Args:
        rows: how they lie.
        pages: ref to u16[buffers, pages, tiles, 8, 128], of each page its layer from the first unit on.
        spare: ref to i32[rows, 128], for rows to be picked apart by phase.
    """

    def __init__(self, rows: PageRows, pages: Ref, spare: Ref) -> None:
        self.rows, self._pages, self._spare = rows, pages, spare
        self._phases = [self._phase(number) for number in rows.phases]

    def read(self, buffer: jax.Array, block: jax.Array, num_tokens: jax.Array) -> tuple[Planes, Planes]:
        """K and V of the first `num_tokens` tokens, 0 beyond: `num_planes` of f32[groups, 128] each.

        Args:
            buffer: which of the buffers holds the pages.
            block: which block of heads.
        """
        rows, kv_format = self.rows, self.rows.kv_format
        k_rows, v_rows = (self._split_phases(self._values(buffer, start, block)) for start in rows.value_starts)
        aux_rows = [self._aux(buffer, part) for part in range(len(kv_format.aux))]
        k_planes, v_planes = [], []
        for phase in self._phases:
            spread = (self._spread(phase, part, words, block) for part, words in enumerate(aux_rows))
            numbers = kv_format.read_aux(tuple(spread))
            k_words, v_words = self._join_parts(k_rows, phase.number), self._join_parts(v_rows, phase.number)
            k, v = kv_format.unpack(k_words, v_words, numbers).scaled_planes()
            known = phase.token < num_tokens
            k_planes += [jnp.where(known, plane, 0.0) for plane in k]
            v_planes += [jnp.where(known, plane, 0.0) for plane in v]
        return tuple(k_planes), tuple(v_planes)

    # -- what does not change from step to step -----------------------------------------------------------------

    def _phase(self, number: int) -> Phase:
        rows = self.rows
        head, token, word = rows.places(number)
        head, inside, word = (part[: rows.page_groups] for part in (head, token, word))
        index = {
            Aux.TOKEN: head * rows.geometry.page_size + inside,
            Aux.CHANNEL: head * rows.width + word,
            Aux.PAGE: head,
        }
        return Phase(number, token, {kind: index[kind] for kind in set(rows.kv_format.aux)})

    # -- words ---------------------------------------------------------------------------------------------------

    def _values(self, buffer: jax.Array, start: int, block: jax.Array) -> jax.Array:
        """The rows of a block of heads, i32[pages, page_groups * period, 128]."""
        rows = self.rows
        tiles = rows.vectors * rows.words // TILE_WORDS
        first = 0 if rows.num_blocks == 1 else block * tiles
        return self._window(buffer, start, rows.page_groups * rows.period, first)

    def _aux(self, buffer: jax.Array, part: int) -> jax.Array:
        """An auxiliary part of all heads, i32[pages, rows, 128]."""
        return self._window(buffer, *aux_window(self.rows, part))

    def _window(self, buffer: jax.Array, start: int, num_rows: int, further_tiles: int | jax.Array = 0) -> jax.Array:
        """Words of every page from `start` (and so many tiles) on, wherever that is: i32[pages, num_rows, 128]."""
        first_tile, first_row, first_lane, tiles = _cut(start, num_rows)
        words = self._pages[buffer, :, ds(first_tile + further_tiles, tiles)].astype(jnp.int32)
        words = words.reshape(self.rows.pages, tiles * SUBLANES, LANES)
        here = words[:, first_row : first_row + num_rows]
        if first_lane == 0:
            return here
        below = words[:, first_row + 1 : first_row + 1 + num_rows]
        return _shift_lanes(here, below, first_lane)

    def _split_phases(self, words: jax.Array) -> list[jax.Array]:
        """i32[groups, 128] of every phase."""
        rows = self.rows
        words = words.reshape(rows.groups * rows.period, LANES)
        if rows.period == 1:
            return [words]
        self._spare[: len(words)] = words
        return [self._spare[ds(phase, rows.groups, stride=rows.period)] for phase in range(rows.period)]

    def _join_parts(self, phases: list[jax.Array], number: int) -> Planes:
        """The words of a phase's values: all their parts, in the lanes of the first."""
        parts = []
        for part in range(self.rows.kv_format.word_parts):
            row, lane = divmod(part * self.rows.width, LANES)
            # Where the group ends no value has words.
            here, below = (phases[min(number + row + i, len(phases) - 1)] for i in (0, 1))
            parts.append(_shift_lanes(here, below, lane) if lane else here)
        return tuple(parts)

    # -- auxiliary parts -----------------------------------------------------------------------------------------

    def _spread(self, phase: Phase, part: int, words: jax.Array, block: jax.Array) -> jax.Array:
        """For each word the number of the auxiliary part that covers it, i32[groups, 128]."""
        rows = self.rows
        kind = rows.kv_format.aux[part]
        size = rows.kv_format.aux_sizes(rows.geometry)[part]
        index = phase.aux_index[kind]
        if rows.num_blocks > 1:
            index = index + block * (rows.heads * size)
        chunks = []
        for first, count, sources in _sources(rows, kind, size, words.shape[1]):
            shape = (rows.pages, count, LANES)
            at = jnp.broadcast_to(index[first : first + count], shape).reshape(-1, LANES)
            found = None
            for source in sources:
                row = jnp.broadcast_to(words[:, source : source + 1], shape).reshape(-1, LANES)
                here = jnp.take_along_axis(row, at & (LANES - 1), axis=1, mode="promise_in_bounds")
                found = here if found is None else jnp.where(at // LANES == source, here, found)
            assert found is not None
            chunks.append(found.reshape(shape))
        spread = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)
        return spread.reshape(rows.groups, LANES)


def buffer_tiles(rows: PageRows) -> int:
    """Tiles of a page's buffer: its layer, and how far beyond it whole tiles are read."""
    length = rows.vectors * rows.words // TILE_WORDS * (rows.num_blocks - 1)
    windows = [(start, rows.page_groups * rows.period) for start in rows.value_starts]
    ends = [length + tiles + first for first, _, _, tiles in (_cut(*window) for window in windows)]
    windows = [aux_window(rows, part) for part in range(len(rows.kv_format.aux))]
    ends += [tiles + first for first, _, _, tiles in (_cut(*window) for window in windows)]
    return max(rows.kv_format.units_per_layer(rows.geometry), *ends)


def aux_window(rows: PageRows, part: int) -> tuple[int, int]:
    """Where an auxiliary part begins, in words, and in how many rows it lies from there on."""
    size = rows.kv_format.aux_sizes(rows.geometry)[part] * rows.geometry.kv_heads
    return rows.kv_format.aux_starts(rows.geometry)[part], -(-size // LANES)


def _cut(start: int, num_rows: int) -> tuple[int, int, int, int]:
    """Tile, row and lane at which a window of so many rows begins, and the tiles it touches."""
    tile, inside = divmod(start, TILE_WORDS)
    row, lane = divmod(inside, LANES)
    return tile, row, lane, -(-(row + num_rows + (lane > 0)) // SUBLANES)


def _shift_lanes(here: jax.Array, below: jax.Array, lanes: int) -> jax.Array:
    """Rows that begin `lanes` later: the end of each row of `here`, then the beginning of that of `below`."""
    axis = here.ndim - 1
    lane = lax.broadcasted_iota(jnp.int32, here.shape, axis)
    here, below = (tpu_roll(part, LANES - lanes, axis) for part in (here, below))
    return jnp.where(lane < LANES - lanes, here, below)


def _sources(rows: PageRows, kind: Aux, size: int, num_rows: int) -> list[tuple[int, int, range]]:
    """Which rows of an auxiliary part cover a page's groups: (first group, groups, rows) for runs of groups."""
    if num_rows == 1 or rows.num_blocks > 1:
        return [(0, rows.page_groups, range(num_rows))]
    runs: list[tuple[int, int, range]] = []
    for group in range(0, rows.page_groups, SUBLANES):
        ends = (group * rows.sharing, min((group + SUBLANES) * rows.sharing, rows.vectors) - 1)
        if kind is not Aux.TOKEN:
            first, last = (vector // rows.geometry.page_size for vector in ends)
            ends = first * size, last * size + size - 1
        sources = range(ends[0] // LANES, ends[1] // LANES + 1)
        if runs and runs[-1][2] == sources:
            runs[-1] = (runs[-1][0], runs[-1][1] + SUBLANES, sources)
        else:
            runs.append((group, SUBLANES, sources))
    return runs
