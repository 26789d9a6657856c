"""From the words of pages in vector memory to keys and values, in rows of 128 lanes (see `lane_layout`)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Granularity, PackedLanes
from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import LANES, SUBLANES, TILE_WORDS, LaneLayout, PageLayout
from fineserve_jax.pallas_kernels.pallas_api import ds, tpu_roll

Ref = Any


class Phase(NamedTuple):
    """What lies where in one phase of the rows; the same for all steps over pages.

    Attributes:
        number: the phase.
        token: i32[groups, 128], the token of each word among those of the joined pages; NOWHERE where no value is.
        scale_index: of each kind of scale array, i32[page_groups, 128], which of a page's scales covers a word.
    """

    number: int
    token: jax.Array
    scale_index: dict[Granularity, jax.Array]


class VectorUnpacker:
    """Unpacks the keys of a head block of a few pages, or its values.

    Args:
        layout: how they lie.
        pages: ref to u16[buffers, pages, tiles, 8, 128], of each page its layer from the first unit on.
        spare: ref to i32[rows, 128], for rows to be picked apart by phase.
    """

    def __init__(self, layout: LaneLayout, pages: Ref, spare: Ref) -> None:
        self.layout, self._pages, self._spare = layout, pages, spare
        self._phases = [self._phase(number) for number in layout.phases]

    def read(self, buffer: jax.Array, block: jax.Array, num_tokens: jax.Array) -> PackedLanes:
        """The vectors of the first `num_tokens` tokens, 0 beyond: `num_packed_lanes` of f32[groups, 128].

        Args:
            buffer: which of the buffers holds the pages.
            block: which head block.
        """
        codec = self.layout.codec
        rows = self._split_phases(self._values(buffer, block))
        scale_rows = [self._scale_words(buffer, part) for part in range(len(codec.scales))]
        lanes = []
        for phase in self._phases:
            spread = (self._spread(phase, part, words, block) for part, words in enumerate(scale_rows))
            scales = codec.read_scales(tuple(spread))
            found = codec.unpack(self._join_parts(rows, phase.number), scales).scaled_lanes()
            known = phase.token < num_tokens
            lanes += [jnp.where(known, packed_lane, 0.0) for packed_lane in found]
        return tuple(lanes)

    # -- what does not change from step to step -----------------------------------------------------------------

    def _phase(self, number: int) -> Phase:
        layout = self.layout
        head, token, word = layout.places(number)
        head, inside, word = (part[: layout.page_groups] for part in (head, token, word))
        index = {
            Granularity.TOKEN: head * layout.geometry.page_size + inside,
            Granularity.CHANNEL: head * layout.width + word,
            Granularity.PAGE: head,
        }
        return Phase(number, token, {kind: index[kind] for kind in set(layout.codec.scales)})

    # -- words ---------------------------------------------------------------------------------------------------

    def _values(self, buffer: jax.Array, block: jax.Array) -> jax.Array:
        """The rows of a head block, i32[pages, page_groups * period, 128]."""
        layout = self.layout
        tiles = layout.vectors * layout.words // TILE_WORDS
        first = 0 if layout.num_head_blocks == 1 else block * tiles
        return self._window(buffer, layout.start, layout.page_groups * layout.period, first)

    def _scale_words(self, buffer: jax.Array, part: int) -> jax.Array:
        """A scale array of all heads, i32[pages, rows, 128]."""
        return self._window(buffer, *scale_window(self.layout, part))

    def _window(self, buffer: jax.Array, start: int, num_rows: int, further_tiles: int | jax.Array = 0) -> jax.Array:
        """Words of every page from `start` (and so many tiles) on, wherever that is: i32[pages, num_rows, 128]."""
        first_tile, first_row, first_lane, tiles = _cut(start, num_rows)
        words = self._pages[buffer, :, ds(first_tile + further_tiles, tiles)].astype(jnp.int32)
        words = words.reshape(self.layout.pages, tiles * SUBLANES, LANES)
        here = words[:, first_row : first_row + num_rows]
        if first_lane == 0:
            return here
        below = words[:, first_row + 1 : first_row + 1 + num_rows]
        return _shift_lanes(here, below, first_lane)

    def _split_phases(self, words: jax.Array) -> list[jax.Array]:
        """i32[groups, 128] of every phase."""
        layout = self.layout
        words = words.reshape(layout.groups * layout.period, LANES)
        if layout.period == 1:
            return [words]
        self._spare[: len(words)] = words
        return [self._spare[ds(phase, layout.groups, stride=layout.period)] for phase in range(layout.period)]

    def _join_parts(self, phases: list[jax.Array], number: int) -> PackedLanes:
        """The words of a phase's values: all their parts, in the lanes of the first."""
        parts = []
        for part in range(self.layout.codec.word_parts):
            row, lane = divmod(part * self.layout.width, LANES)
            # Where the group ends no value has words.
            here, below = (phases[min(number + row + i, len(phases) - 1)] for i in (0, 1))
            parts.append(_shift_lanes(here, below, lane) if lane else here)
        return tuple(parts)

    # -- scale arrays --------------------------------------------------------------------------------------------

    def _spread(self, phase: Phase, part: int, words: jax.Array, block: jax.Array) -> jax.Array:
        """For each word the scale that covers it, i32[groups, 128]."""
        layout = self.layout
        kind = layout.codec.scales[part]
        size = layout.codec.scale_sizes(layout.geometry)[part]
        index = phase.scale_index[kind]
        if layout.num_head_blocks > 1:
            index = index + block * (layout.heads * size)
        chunks = []
        for first, count, sources in _sources(layout, kind, size, words.shape[1]):
            shape = (layout.pages, count, LANES)
            at = jnp.broadcast_to(index[first : first + count], shape).reshape(-1, LANES)
            found = None
            for source in sources:
                row = jnp.broadcast_to(words[:, source : source + 1], shape).reshape(-1, LANES)
                here = jnp.take_along_axis(row, at & (LANES - 1), axis=1, mode="promise_in_bounds")
                found = here if found is None else jnp.where(at // LANES == source, here, found)
            assert found is not None
            chunks.append(found.reshape(shape))
        spread = chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=1)
        return spread.reshape(layout.groups, LANES)


def buffer_tiles(layout: PageLayout) -> int:
    """Tiles of a page's buffer: its layer, and how far beyond it whole tiles are read."""
    ends = [layout.kv_format.units_per_layer(layout.geometry)]
    for side in layout.sides:
        length = side.vectors * side.words // TILE_WORDS * (side.num_head_blocks - 1)
        first, *_, tiles = _cut(side.start, side.page_groups * side.period)
        ends.append(length + first + tiles)
        windows = [scale_window(side, part) for part in range(len(side.codec.scales))]
        ends += [tiles + first for first, _, _, tiles in (_cut(*window) for window in windows)]
    return max(ends)


def scale_window(layout: LaneLayout, part: int) -> tuple[int, int]:
    """Where a scale array begins, in words, and in how many rows it lies from there on."""
    size = layout.codec.scale_sizes(layout.geometry)[part] * layout.geometry.kv_heads
    return layout.scale_starts[part], -(-size // LANES)


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


def _sources(layout: LaneLayout, kind: Granularity, size: int, num_rows: int) -> list[tuple[int, int, range]]:
    """Which rows of a scale array cover a page's groups: (first group, groups, rows) for runs of groups."""
    if num_rows == 1 or layout.num_head_blocks > 1:
        return [(0, layout.page_groups, range(num_rows))]
    runs: list[tuple[int, int, range]] = []
    for group in range(0, layout.page_groups, SUBLANES):
        ends = (group * layout.sharing, min((group + SUBLANES) * layout.sharing, layout.vectors) - 1)
        if kind is not Granularity.TOKEN:
            first, last = (vector // layout.geometry.page_size for vector in ends)
            ends = first * size, last * size + size - 1
        sources = range(ends[0] // LANES, ends[1] // LANES + 1)
        if runs and runs[-1][2] == sources:
            runs[-1] = (runs[-1][0], runs[-1][1] + SUBLANES, sources)
        else:
            runs.append((group, SUBLANES, sources))
    return runs
