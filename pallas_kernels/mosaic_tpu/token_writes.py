"""Writing new tokens on TPUs.

Only whole units can be copied to the arena, and a token's words lie scattered over all of a page's layer, some in each
head's block. So a page's layers are read, changed in vector memory and written back, a group of layers at a time:
several groups are on their way at once, to hide what it takes a copy to arrive.

XLA prepares the new words of a layer as units of their own. First come the vectors, K of all heads, then V, in rows of
128 lanes, each shifted to the lanes in which it will lie; those of K and of V each fill whole units:

    |        | vector .......................... | row 0        R rows each, more than one if it crosses rows
    | ... vector |                               | row 1

Then come the words of scales, every word in all T places that it could take:

    | scale of head 0, T times | scale of head 1, T times | ...        aligned as in the page
"""

import functools
import itertools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.geometry import TPU_TILE, PageGeometry
from fineserve_jax.pallas_kernels.page_layout import joined
from fineserve_jax.pallas_kernels.pallas_api import (
    TpuDMASemaphore,
    TpuPrefetchScalarGridSpec,
    TpuVMEM,
    ds,
    pallas_call,
    tpu_async_copy,
    tpu_in_place,
    tpu_interpret,
    tpu_params,
    when,
)
from fineserve_jax.pallas_kernels.specs import WriteSpec

SUBLANES, LANES = TPU_TILE
TILE_WORDS = SUBLANES * LANES
BUFFERS, AHEAD = 4, 2  # groups of layers in vector memory, and how many of them are being read
GROUP_UNITS = 256  # of a group, 512 KiB, unless a layer is larger

Ref = Any


@dataclass(frozen=True)
class _Vectors:
    """Sizes of the keys, or of the values.

    Attributes:
        heads: vectors of a token.
        page_size: tokens of a page.
        words: words of a vector.
        start: where in a page's layer they begin, in words.
        first_unit: where among the new units of a layer theirs begin.
    """

    heads: int
    page_size: int
    words: int
    start: int
    first_unit: int

    @property
    def shift_step(self) -> int:
        """Vectors begin in lanes that are multiples of this."""
        return math.gcd(self.words, self.start, LANES)

    @property
    def rows(self) -> int:
        """Rows of lanes that a vector touches at most."""
        return -(-(self.words + LANES - self.shift_step) // LANES)

    @property
    def units(self) -> int:
        """Units of new vectors of a layer."""
        return -(-self.heads * self.rows // SUBLANES)

    @property
    def most_tiles(self) -> int:
        """Units that a vector touches at most."""
        return 1 if TILE_WORDS % self.words == 0 and self.start % self.words == 0 else 2


@dataclass(frozen=True)
class _Layout:
    """Sizes of a launch."""

    kv_format: KVFormat
    geometry: PageGeometry

    @property
    def sides(self) -> tuple[_Vectors, _Vectors]:
        """The keys and the values."""
        geometry = self.geometry
        of_keys, of_values = (
            (geometry.kv_heads, geometry.page_size, codec.vector_words(geometry), start)
            for codec, start in zip(self.kv_format.sides, self.kv_format.block_starts(geometry), strict=True)
        )
        keys = _Vectors(*of_keys, first_unit=0)
        return keys, _Vectors(*of_values, first_unit=keys.units)

    @property
    def vector_units(self) -> int:
        """Units of new vectors of a layer."""
        return sum(side.units for side in self.sides)

    @property
    def scale_words(self) -> tuple[int, int]:
        """Where in a page's layer words of scales begin and end."""
        end = self.kv_format.words_per_layer(self.geometry)
        return min((*itertools.chain(*self.kv_format.scale_starts(self.geometry)), end)), end

    @property
    def scale_units(self) -> range:
        """Units of a page's layer with words of scales."""
        start, end = self.scale_words
        return range(start // TILE_WORDS, -(-end // TILE_WORDS) if end > start else start // TILE_WORDS)

    @property
    def new_units(self) -> int:
        return self.vector_units + len(self.scale_units)

    @property
    def layer_units(self) -> int:
        return self.kv_format.units_per_layer(self.geometry)

    @property
    def group(self) -> int:
        """Layers of a group: a divisor of their number."""
        layers = self.geometry.num_layers
        return max(size for size in range(1, layers + 1) if layers % size == 0 and size <= self._most_layers)

    @property
    def _most_layers(self) -> int:
        return max(1, GROUP_UNITS // self.layer_units)

    @property
    def groups(self) -> int:
        return self.geometry.num_layers // self.group


def write_tokens(
    spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Writes one token into each of N pages: see `Backend.write_tokens`."""
    layout = _Layout(kv_format, spec.geometry)
    order = jnp.argsort(pages >= len(arena))  # those to be written come first
    count = jnp.sum(pages < len(arena), dtype=jnp.int32)
    vectors = [_vector_units(joined(part.words), offsets, side) for part, side in zip(words, layout.sides, strict=True)]
    new = jnp.concatenate([*vectors, *_scale_units(words, layout)], axis=2)
    return pallas_call(
        functools.partial(_kernel, layout),
        grid_spec=TpuPrefetchScalarGridSpec(
            num_scalar_prefetch=4,
            grid=(1,),
            in_specs=[tpu_in_place()] * 2,
            out_specs=tpu_in_place(),
            scratch_shapes=[
                TpuVMEM((BUFFERS, layout.group * layout.layer_units, SUBLANES, LANES), jnp.uint16),
                TpuVMEM((BUFFERS, layout.group, layout.new_units, SUBLANES, LANES), jnp.uint16),
                TpuDMASemaphore((3, BUFFERS)),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(arena.shape, arena.dtype),
        input_output_aliases={5: 0},
        compiler_params=tpu_params(("arbitrary",)),
        interpret=tpu_interpret(bool(spec.interpret)),
        name="write_tokens",
    )(count.reshape(1), order, pages, offsets, new, arena)


def _vector_units(vectors: jax.Array, offsets: jax.Array, side: _Vectors) -> jax.Array:
    """The new keys, or values, u16[layers, heads, N, 1, W], as u16[N, layers, units, 8, 128]."""
    vectors = jnp.moveaxis(vectors[:, :, :, 0], 2, 0)
    num_tokens, layers, heads, width = vectors.shape
    lane = (side.start + (jnp.arange(heads) * side.page_size + offsets[:, None]) * width) % LANES
    room = side.rows * LANES - width
    rows = jnp.zeros((num_tokens, layers, heads, side.rows * LANES), jnp.uint16)
    for shift in range(0, LANES, side.shift_step):
        shifted = jnp.pad(vectors, [(0, 0)] * 3 + [(shift, room - shift)])
        rows = jnp.where(lane[:, None, :, None] == shift, shifted, rows)
    rows = rows.reshape(num_tokens, layers, -1)
    rows = jnp.pad(rows, [(0, 0), (0, 0), (0, side.units * TILE_WORDS - rows.shape[-1])])
    return rows.reshape(num_tokens, layers, -1, SUBLANES, LANES)


def _scale_units(words: PageWords, layout: _Layout) -> list[jax.Array]:
    """The new words of scales, u16[N, layers, scale_units, 8, 128], if there are any."""
    arrays = [words[side].scales[i] for side, i in layout.kv_format.scale_order()]
    if not arrays:
        return []
    parts = [jnp.moveaxis(part[:, :, :, 0], 2, 0) for part in arrays]  # N, layers, heads, 1
    places = [jnp.broadcast_to(part, (*part.shape[:3], layout.geometry.page_size)) for part in parts]
    flat = jnp.concatenate([part.reshape(*part.shape[:2], -1) for part in places], axis=-1)
    start, _ = layout.scale_words
    before = start - layout.scale_units.start * TILE_WORDS
    behind = len(layout.scale_units) * TILE_WORDS - before - flat.shape[-1]
    flat = jnp.pad(flat, [(0, 0), (0, 0), (before, behind)])
    return [flat.reshape(*flat.shape[:2], -1, SUBLANES, LANES)]


def _kernel(
    layout: _Layout,
    count: Ref,
    order: Ref,
    pages: Ref,
    offsets: Ref,
    new: Ref,
    _arena_before: Ref,
    arena: Ref,
    old_buffers: Ref,
    new_buffers: Ref,
    semaphores: Ref,
) -> None:
    """Takes groups of layers, token by token, as steps, each with its buffer:

    step s:   start reading s + 2   |   wait for s to be read   |   change it   |   start writing s

    The buffer of step s + 2 is that of s - 2, which has to be written before.
    """
    steps = count[0] * layout.groups
    copies = _GroupCopies(layout, order, pages, new, arena, old_buffers, new_buffers, semaphores)

    def take(step: jax.Array, _: None) -> None:
        ahead = step + AHEAD
        when((ahead >= BUFFERS) & (ahead < steps))(functools.partial(copies.wait_for_write, ahead - BUFFERS))
        when(ahead < steps)(functools.partial(copies.start_reads, ahead))
        copies.wait_for_reads(step)
        buffer = lax.rem(step, BUFFERS)
        new_words, old_words = new_buffers.at[buffer], old_buffers.at[buffer]
        change_layer = functools.partial(_change_layer, layout, new_words, old_words, offsets[copies.token(step)])
        lax.fori_loop(0, layout.group, change_layer, None)
        copies.start_write(step)

    for step in range(AHEAD):
        when(step < steps)(functools.partial(copies.start_reads, jnp.int32(step)))
    lax.fori_loop(0, steps, take, None)
    for last in range(1, BUFFERS + 1):
        when(steps >= last)(functools.partial(copies.wait_for_write, steps - last))


@dataclass(frozen=True)
class _GroupCopies:
    """The copies of a step's group of layers, from the arena to its buffer and back, and of the new words."""

    layout: _Layout
    order: Ref
    pages: Ref
    new: Ref
    arena: Ref
    old_buffers: Ref
    new_buffers: Ref
    semaphores: Ref

    def token(self, step: jax.Array) -> jax.Array:
        return self.order[lax.div(step, self.layout.groups)]

    def start_reads(self, step: jax.Array) -> None:
        for copy in self._reads(step):
            copy.start()

    def wait_for_reads(self, step: jax.Array) -> None:
        for copy in self._reads(step):
            copy.wait()

    def start_write(self, step: jax.Array) -> None:
        self._write(step).start()

    def wait_for_write(self, step: jax.Array) -> None:
        self._write(step).wait()

    def _units(self, step: jax.Array) -> Ref:
        layout = self.layout
        size = layout.group * layout.layer_units
        return self.arena.at[ds(self.pages[self.token(step)] + lax.rem(step, layout.groups) * size, size)]

    def _reads(self, step: jax.Array) -> list[Any]:
        layout, buffer = self.layout, lax.rem(step, BUFFERS)
        group = lax.rem(step, layout.groups)
        words = self.new.at[self.token(step), ds(group * layout.group, layout.group)]
        return [
            tpu_async_copy(self._units(step), self.old_buffers.at[buffer], self.semaphores.at[0, buffer]),
            tpu_async_copy(words, self.new_buffers.at[buffer], self.semaphores.at[1, buffer]),
        ]

    def _write(self, step: jax.Array) -> Any:
        buffer = lax.rem(step, BUFFERS)
        return tpu_async_copy(self.old_buffers.at[buffer], self._units(step), self.semaphores.at[2, buffer])


def _change_layer(layout: _Layout, new: Ref, old: Ref, offset: jax.Array, layer: jax.Array, _: None) -> None:
    """Puts the new words of one layer of a group, `new[layer]`, into its units, of which `old` holds all layers'."""
    first_unit = layer * layout.layer_units
    sublane = lax.broadcasted_iota(jnp.int32, TPU_TILE, 0)
    word = sublane * LANES + lax.broadcasted_iota(jnp.int32, TPU_TILE, 1)

    def change(unit: jax.Array | int, mask: jax.Array, values: jax.Array) -> None:
        before = old[first_unit + unit].astype(jnp.int32)
        old[first_unit + unit] = jnp.where(mask, values, before).astype(jnp.uint16)

    for side in layout.sides:
        for head in range(side.heads):
            start = side.start + (head * side.page_size + offset) * side.words
            end, first_row = start + side.words, lax.div(start, LANES)
            new_row = side.first_unit * SUBLANES + head * side.rows
            rows = [_new_row(new, layer, new_row + i) for i in range(side.rows)]
            for further in range(side.most_tiles):
                unit = jnp.minimum(lax.div(start, TILE_WORDS) + further, layout.layer_units - 1)
                here = unit * TILE_WORDS + word
                values = rows[0]
                for i in range(1, side.rows):
                    values = jnp.where(unit * SUBLANES + sublane == first_row + i, rows[i], values)
                change(unit, (here >= start) & (here < end), values)
    scale_start, scale_end = layout.scale_words
    for i, scale_unit in enumerate(layout.scale_units):
        here = scale_unit * TILE_WORDS + word
        own = (here - scale_start) & (layout.geometry.page_size - 1) == offset
        values = new[layer, layout.vector_units + i].astype(jnp.int32)
        change(scale_unit, own & (here >= scale_start) & (here < scale_end), values)


def _new_row(new: Ref, layer: jax.Array, row: int) -> jax.Array:
    """A row of the new vectors in all sublanes, i32[8, 128]."""
    unit = new[layer, row // SUBLANES].astype(jnp.int32)
    return jnp.broadcast_to(unit[row % SUBLANES :][:1], TPU_TILE)
