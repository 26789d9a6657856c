"""Converting pages from one format to another in Triton.

A program takes the keys, or the values, of one head of one layer of one page; if the target encodes tokens by
themselves, only so many of its tokens as fit in registers. It decodes the source's words, changes the basis if the two
formats keep their vectors in different ones, and encodes for the target. All arrays are [tokens, lanes], lanes being
words of a vector. The target's planes are slices of the head's channels, and so are the source's:

    source, 2 planes    | 0                             | 1                             |
    target, 4 planes    | 0             | 1             | 2             | 3             |

Where the basis stays, words are loaded that unpack to what is wanted: half of a vector's words to halves of its planes;
and twice all of them, one after the other, to planes twice as wide, of which each lane then takes the right one. Where
it changes, words are multiplied by their rows of the matrix on tensor cores: some at a time of every vector are loaded,
so many that loads are wide, and are then taken by a loop in pieces so small that products fit in registers.

A program has as many warps as it takes for each of its threads to load 128 bits at once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.formats import Aux, KVFormat, Planes
from fineserve_jax.pallas_kernels.formats.sides import KEYS, SIDES, sides_of_aux
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params, when
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.pallas_api import triton_store as store
from fineserve_jax.pallas_kernels.specs import WriteSpec
from fineserve_jax.pallas_kernels.triton.addressing import LEAST_LANES, at, clear_padding, padded, words_at
from fineserve_jax.pallas_kernels.triton.products import exact_product, pick

BLOCK_VALUES = 32 * 128  # that a program converts if it is free to choose
WARP_WORDS = 256  # 8 words, 128 bits, a thread
WARP_VALUES = 512
MAX_WARPS = 8  # more of them have too few registers each

Ref = Any


@dataclass(frozen=True)
class _Change:
    """What is static of a launch.

    Attributes:
        tokens: of a program.
        rotates: whether the two formats keep their vectors in different bases.
        interpret: whether there are no tensor cores.
    """

    source: KVFormat
    target: KVFormat
    geometry: PageGeometry
    tokens: int
    rotates: bool
    interpret: bool

    @property
    def blocks(self) -> int:
        """Programs for one side of a head."""
        return self.geometry.page_size // self.tokens

    @property
    def warps(self) -> int:
        widths = self.source.width(self.geometry), self.target.width(self.geometry)
        words = self.tokens * padded(widths[0] if self.rotates else min(widths))
        values = self.tokens * padded(self.geometry.head_dim)
        return max(1, min(words // WARP_WORDS, values // WARP_VALUES, MAX_WARPS))

    @property
    def lanes_at_a_time(self) -> int:
        """Lanes of the source's vectors that are multiplied at a time."""
        most = padded(self.source.width(self.geometry))
        return max(LEAST_LANES, min(self.warps * WARP_WORDS // self.tokens, most))


def requantize(
    spec: WriteSpec,
    source: KVFormat,
    target: KVFormat,
    arena: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Reads full pages in one format and writes what they hold to others in another: see `Backend.requantize`."""
    geometry, interpret = spec.geometry, bool(spec.interpret)
    units = arena.reshape(len(arena), -1)
    matrix = change_of_basis(source, target, geometry.head_dim)
    operands = [sources, targets, jnp.asarray(count, jnp.int32).reshape(1), units]
    if matrix is not None:
        operands.append(jnp.asarray(matrix))
    change = _Change(source, target, geometry, _tokens(target, geometry), matrix is not None, interpret)
    launch = pallas_call(
        functools.partial(_kernel, change=change),
        grid=(len(sources), geometry.num_layers, len(SIDES) * geometry.kv_heads * change.blocks),
        out_shape=jax.ShapeDtypeStruct(units.shape, units.dtype),
        input_output_aliases={3: 0},
        compiler_params=triton_params(num_warps=change.warps, num_stages=1),
        interpret=interpret,
        name="requantize",
    )
    return launch(*operands).reshape(arena.shape)


def _tokens(target: KVFormat, geometry: PageGeometry) -> int:
    """Tokens of a program: all of a page's if they have to be encoded together."""
    if target.residual is not None:
        return geometry.page_size
    return min(geometry.page_size, max(16, BLOCK_VALUES // padded(geometry.head_dim)))


def change_of_basis(source: KVFormat, target: KVFormat, head_dim: int) -> np.ndarray | None:
    """f32[head_dim, head_dim], what turns the source's vectors into the target's: source @ this. None: nothing."""
    before, after = source.rotation(head_dim), target.rotation(head_dim)
    if before is None or after is None:
        return after if before is None else before.T
    return None if np.array_equal(before, after) else (before.T.astype(np.float64) @ after).astype(np.float32)


def _kernel(sources: Ref, targets: Ref, count: Ref, _arena_before: Ref, *refs: Ref, change: _Change) -> None:
    *matrix, arena = refs
    geometry, tokens = change.geometry, change.tokens
    item, layer, block = program_id(0), program_id(1), program_id(2)
    page = load(targets.at[item])
    wanted, block = lax.rem(block, len(SIDES)), lax.div(block, len(SIDES))
    head, first_token = lax.div(block, change.blocks), lax.rem(block, change.blocks) * tokens
    token = first_token + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)

    def convert(side: int) -> None:
        source_unit = load(sources.at[item]) + layer * change.source.units_per_layer(geometry)
        reader = _Vectors(change.source, geometry, arena, source_unit, side, head, token)
        planes = _rotated(reader, change, *matrix) if matrix else _resliced(reader, change.target)
        target_unit = page + layer * change.target.units_per_layer(geometry)
        _Vectors(change.target, geometry, arena, target_unit, side, head, token).store(planes)
        if side == KEYS:
            when(block == 0)(functools.partial(clear_padding, arena, target_unit, change.target, geometry))

    for side in SIDES:
        counts = (wanted == side) & (item < count[0]) & (page < arena.shape[0])
        when(counts)(functools.partial(convert, side))


@dataclass(frozen=True)
class _Vectors:
    """The keys or the values of some tokens, i32[tokens, 1], of one head of one layer of a page in the arena."""

    kv_format: KVFormat
    geometry: PageGeometry
    arena: Ref
    first_unit: jax.Array
    side: int
    head: jax.Array
    token: jax.Array

    @property
    def width(self) -> int:
        return self.kv_format.width(self.geometry)

    def lanes(self) -> jax.Array:
        """i32[1, lanes], a power of two of them; those beyond the width have no word."""
        return lax.broadcasted_iota(jnp.int32, (1, padded(self.width)), 1)

    def word_places(self, lane: jax.Array) -> tuple[jax.Array, ...]:
        """Where each part of the words of some lanes, i32[1, lanes], lies: i32[tokens, lanes]."""
        geometry, kv_format = self.geometry, self.kv_format
        block = self.side * geometry.kv_heads + self.head
        first = block * kv_format.block_words(geometry) + self.token * kv_format.vector_words(geometry)
        return tuple(first + (part * self.width + lane) for part in range(kv_format.word_parts))

    def aux_places(self, lane: jax.Array) -> list[jax.Array | None]:
        """Where the auxiliary numbers of the side lie; None for those of the other side."""
        geometry, kv_format = self.geometry, self.kv_format
        within = {Aux.TOKEN: self.token, Aux.CHANNEL: lane, Aux.PAGE: jnp.zeros((1, 1), jnp.int32)}
        parts = zip(
            kv_format.aux,
            kv_format.aux_starts(geometry),
            kv_format.aux_sizes(geometry),
            sides_of_aux(kv_format),
            strict=True,
        )
        return [
            start + self.head * size + within[kind] if side == self.side else None for kind, start, size, side in parts
        ]

    def load(self, lane: jax.Array) -> Planes:
        """Planes, f32[tokens, lanes], in the format's basis; of some lanes, i32[1, lanes], finite beyond the width."""
        return self.unpack(self.load_words(lane), lane)

    def load_words(self, lane: jax.Array) -> tuple[jax.Array, ...]:
        """The word parts, u16[tokens, lanes], of some lanes, i32[1, lanes]; 0 beyond the width."""
        return tuple(self._load(places, lane) for places in self.word_places(lane))

    def unpack(self, words: tuple[jax.Array, ...], lane: jax.Array) -> Planes:
        """The planes that words of some lanes stand for."""
        none = jnp.zeros((1, 1), jnp.uint16)
        aux = tuple(none if places is None else self._load(places, lane) for places in self.aux_places(lane))
        # The other side's words are not looked at: what comes of them is dropped.
        vectors = self.kv_format.unpack(words, words, self.kv_format.read_aux(aux))
        return vectors.scaled_planes()[self.side]

    def store(self, planes: Planes) -> None:
        """Encodes planes, f32[tokens, lanes], and stores them."""
        encoded, lane = self.kv_format.encode(planes, planes), self.lanes()
        words = (encoded.k, encoded.v)[self.side]
        for places, part in (
            *zip(self.word_places(lane), words, strict=True),
            *zip(self.aux_places(lane), encoded.aux, strict=True),
        ):
            if places is not None:
                store(words_at(self.arena, self.first_unit, places), part, mask=self._inside(places, lane))

    def _load(self, places: jax.Array, lane: jax.Array) -> jax.Array:
        at_places = words_at(self.arena, self.first_unit, places)
        mask = self._inside(places, lane)
        return load(at_places) if mask is None else load(at_places, mask=mask, other=jnp.uint16(0))

    def _inside(self, places: jax.Array, lane: jax.Array) -> jax.Array | None:
        """Which places belong to lanes that there are; None: all."""
        if self.width == padded(self.width) or places.shape[1] == 1:
            return None
        return jnp.broadcast_to(lane < self.width, places.shape)


def _resliced(reader: _Vectors, target: KVFormat) -> Planes:
    """The source's vectors as planes of the target, which has the same basis."""
    width, source_width = target.width(reader.geometry), reader.width
    lane = lax.broadcasted_iota(jnp.int32, (1, padded(width)), 1)
    if width <= source_width:
        slices = [reader.load(start + lane) for start in range(0, source_width, width)]
        planes = [part[plane] for plane in range(reader.kv_format.planes) for part in slices]
    else:
        planes = _merged(reader.load(lax.rem(lane, source_width)), lax.div(lane, source_width), width // source_width)
    return tuple(_padded_evenly(plane, lane, width) for plane in planes)


def _merged(planes: Planes, which: jax.Array, count: int) -> list[jax.Array]:
    """Planes of `count` planes each, one beside the other: of which of them each lane is, says `which`."""

    def merge(parts: Planes) -> jax.Array:
        return functools.reduce(lambda left, i: jnp.where(which < i, left, parts[i]), range(1, count), parts[0])

    return [merge(planes[i : i + count]) for i in range(0, len(planes), count)]


def _padded_evenly(plane: jax.Array, lane: jax.Array, width: int) -> jax.Array:
    """Gives the lanes beyond the width the value of the first, so that minima and maxima do not see them."""
    if lane.size == width:
        return plane
    first = jnp.sum(jnp.where(lane == 0, plane, 0.0), axis=1, keepdims=True)
    return jnp.where(lane < width, plane, first)


def _rotated(reader: _Vectors, change: _Change, matrix: Ref) -> Planes:
    """The source's vectors times `matrix`, f32[head_dim, head_dim], as planes of the target.

    Lanes beyond the width repeat the last one, so that minima and maxima do not see them.
    """
    width, source_width = change.target.width(reader.geometry), reader.width
    column = jnp.minimum(lax.broadcasted_iota(jnp.int32, (1, padded(width)), 1), width - 1)
    lanes = change.lanes_at_a_time
    product = functools.partial(jnp.dot, precision=exact_product(interpret=change.interpret))

    def add(step: jax.Array, sums: Planes) -> Planes:
        words = reader.load_words(step * lanes + lax.broadcasted_iota(jnp.int32, (1, lanes), 1))
        count = lanes // LEAST_LANES
        pieces = [jnp.split(part, count, axis=1) for part in words]

        def add_piece(piece: jax.Array, sums: Planes) -> Planes:
            lane = (step * count + piece) * LEAST_LANES + lax.broadcasted_iota(jnp.int32, (1, LEAST_LANES), 1)
            return multiply(tuple(pick(part, piece) for part in pieces), lane, sums)

        return lax.fori_loop(0, count, add_piece, sums)

    def multiply(words: tuple[jax.Array, ...], lane: jax.Array, sums: Planes) -> Planes:
        row = jnp.minimum(lane, source_width - 1).reshape(-1, 1)
        for i, plane in enumerate(reader.unpack(words, lane)):
            part = jnp.where(lane < source_width, plane, 0.0) if source_width % lanes else plane
            blocks = [load(at(matrix, i * source_width + row, j * width + column)) for j in range(change.target.planes)]
            sums = tuple(total + product(part, block) for total, block in zip(sums, blocks, strict=True))
        return sums

    nothing = (jnp.zeros((change.tokens, column.size), jnp.float32),) * change.target.planes
    return lax.fori_loop(0, -(-source_width // lanes), add, nothing)
