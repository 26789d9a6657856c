"""Converting pages from one format to another in Triton.

A program takes the keys, or the values, of one head of one layer of one page; if the target encodes tokens by
themselves, only so many of its tokens as fit in registers. It decodes the source's words, changes the rotation if the
two formats keep their vectors in different ones, and encodes for the target. All arrays are [tokens, columns], columns
being words of a vector. The target's packed lanes are slices of the head's channels, and so are the source's:

    source, 2 lanes     | 0                             | 1                             |
    target, 4 lanes     | 0             | 1             | 2             | 3             |

Where the rotation stays, words are loaded that unpack to what is wanted: half of a vector's words to halves of its
lanes; and twice all of them, one after the other, to lanes twice as wide, of which each column then takes the right
one. Where it changes, words are multiplied by their rows of the matrix on tensor cores: some at a time of every vector
are loaded, so many that loads are wide, and a loop then takes them in pieces so small that products fit in registers.

A program has as many warps as it takes for each of its threads to load 128 bits at once.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.formats import KEYS, SIDES, Codec, KVFormat, PackedLanes
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params, when
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.specs import WriteSpec
from fineserve_jax.pallas_kernels.triton.addressing import LEAST_COLUMNS, at, clear_padding, padded
from fineserve_jax.pallas_kernels.triton.products import exact_product, pick
from fineserve_jax.pallas_kernels.triton.vector_block import VectorBlock

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
        rotates: whether the two formats keep their keys, and their values, in different rotations.
        interpret: whether there are no tensor cores.
    """

    source: KVFormat
    target: KVFormat
    geometry: PageGeometry
    tokens: int
    rotates: tuple[bool, bool]
    interpret: bool

    @property
    def blocks(self) -> int:
        """Programs for one side of a head."""
        return self.geometry.page_size // self.tokens

    @property
    def warps(self) -> int:
        return max(self._warps(side) for side in SIDES)

    def _warps(self, side: int) -> int:
        widths = [kv_format.sides[side].width(self.geometry) for kv_format in (self.source, self.target)]
        words = self.tokens * padded(widths[0] if self.rotates[side] else min(widths))
        values = self.tokens * padded(self.geometry.head_dim)
        return max(1, min(words // WARP_WORDS, values // WARP_VALUES, MAX_WARPS))

    def columns_at_a_time(self, source: Codec) -> int:
        """Columns of the source's vectors that are multiplied at a time."""
        most = padded(source.width(self.geometry))
        return max(LEAST_COLUMNS, min(self.warps * WARP_WORDS // self.tokens, most))


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
    geometry = spec.geometry
    units = arena.reshape(len(arena), -1)
    of_keys, of_values = (
        change_of_rotation(*codecs, geometry.head_dim) for codecs in zip(source.sides, target.sides, strict=True)
    )
    matrices = _distinct(of_keys, of_values)
    operands = [sources, targets, jnp.asarray(count, jnp.int32).reshape(1), units, *map(jnp.asarray, matrices)]
    rotates = of_keys is not None, of_values is not None
    change = _Change(source, target, geometry, _tokens(target, geometry), rotates, bool(spec.interpret))
    launch = pallas_call(
        functools.partial(_kernel, change=change),
        grid=(len(sources), geometry.num_layers, len(SIDES) * geometry.kv_heads * change.blocks),
        out_shape=jax.ShapeDtypeStruct(units.shape, units.dtype),
        input_output_aliases={3: 0},
        compiler_params=triton_params(num_warps=change.warps, num_stages=1),
        interpret=spec.interpret,
        name="requantize",
    )
    return launch(*operands).reshape(arena.shape)


def _tokens(target: KVFormat, geometry: PageGeometry) -> int:
    """Tokens of a program: all of a page's if they have to be encoded together."""
    if target.residual is not None:
        return geometry.page_size
    return min(geometry.page_size, max(16, BLOCK_VALUES // padded(geometry.head_dim)))


def change_of_rotation(source: Codec, target: Codec, head_dim: int) -> np.ndarray | None:
    """f32[head_dim, head_dim], what turns the source's vectors into the target's: source @ this. None: nothing."""
    before, after = source.rotation(head_dim), target.rotation(head_dim)
    if before is None or after is None:
        return after if before is None else before.T
    return None if np.array_equal(before, after) else (before.T.astype(np.float64) @ after).astype(np.float32)


def _distinct(of_keys: np.ndarray | None, of_values: np.ndarray | None) -> list[np.ndarray]:
    """The matrices that there are: that of keys is the first, that of values the last; one if they are the same."""
    if of_keys is not None and of_values is not None and np.array_equal(of_keys, of_values):
        return [of_keys]
    return [matrix for matrix in (of_keys, of_values) if matrix is not None]


def _kernel(sources: Ref, targets: Ref, count: Ref, _arena_before: Ref, *refs: Ref, change: _Change) -> None:
    *matrices, arena = refs
    geometry, tokens = change.geometry, change.tokens
    item, layer, block = program_id(0), program_id(1), program_id(2)
    page = load(targets.at[item])
    wanted, block = lax.rem(block, len(SIDES)), lax.div(block, len(SIDES))
    head, first_token = lax.div(block, change.blocks), lax.rem(block, change.blocks) * tokens
    token = first_token + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)

    def convert(side: int) -> None:
        source_unit = load(sources.at[item]) + layer * change.source.units_per_layer(geometry)
        source = VectorBlock(change.source, geometry, arena, source_unit, side, head, token)
        target = change.target.sides[side]
        matrix = matrices[-side] if change.rotates[side] else None
        lanes = _resliced(source, target) if matrix is None else _rotated(source, target, change, matrix)
        target_unit = page + layer * change.target.units_per_layer(geometry)
        VectorBlock(change.target, geometry, arena, target_unit, side, head, token).store(lanes)
        if side == KEYS:
            when(block == 0)(functools.partial(clear_padding, arena, target_unit, change.target, geometry))

    for side in SIDES:
        counts = (wanted == side) & (item < count[0]) & (page < arena.shape[0])
        when(counts)(functools.partial(convert, side))


# -- the rotation stays ----------------------------------------------------------------------------------------


def _resliced(source: VectorBlock, target: Codec) -> PackedLanes:
    """The source's vectors as packed lanes of the target, which has the same rotation."""
    width, source_width = target.width(source.geometry), source.width
    column = lax.broadcasted_iota(jnp.int32, (1, padded(width)), 1)
    if width <= source_width:
        slices = [source.load(start + column) for start in range(0, source_width, width)]
        lanes = [part[lane] for lane in range(source.codec.packed_lanes) for part in slices]
    else:
        narrow = source.load(lax.rem(column, source_width))
        lanes = _merged(narrow, lax.div(column, source_width), width // source_width)
    return tuple(_padded_evenly(lane, column, width) for lane in lanes)


def _merged(lanes: PackedLanes, which: jax.Array, count: int) -> list[jax.Array]:
    """Lanes of `count` lanes each, one beside the other: of which of them each column is, says `which`."""

    def merge(parts: PackedLanes) -> jax.Array:
        return functools.reduce(lambda left, i: jnp.where(which < i, left, parts[i]), range(1, count), parts[0])

    return [merge(lanes[i : i + count]) for i in range(0, len(lanes), count)]


def _padded_evenly(lane: jax.Array, column: jax.Array, width: int) -> jax.Array:
    """Gives the columns beyond the width the value of the first, so that minima and maxima do not see them."""
    if column.size == width:
        return lane
    first = jnp.sum(jnp.where(column == 0, lane, 0.0), axis=1, keepdims=True)
    return jnp.where(column < width, lane, first)


# -- the rotation changes --------------------------------------------------------------------------------------


def _rotated(source: VectorBlock, target: Codec, change: _Change, matrix: Ref) -> PackedLanes:
    """The source's vectors times `matrix`, f32[head_dim, head_dim], as packed lanes of the target.

    Columns beyond the width repeat the last one, so that minima and maxima do not see them.
    """
    width = target.width(source.geometry)
    target_column = jnp.minimum(lax.broadcasted_iota(jnp.int32, (1, padded(width)), 1), width - 1)
    columns = change.columns_at_a_time(source.codec)
    count = columns // LEAST_COLUMNS
    multiply = functools.partial(_multiply, source, target, change, matrix, target_column)

    def add(step: jax.Array, sums: PackedLanes) -> PackedLanes:
        words = source.load_words(step * columns + lax.broadcasted_iota(jnp.int32, (1, columns), 1))
        pieces = [jnp.split(part, count, axis=1) for part in words]

        def add_piece(piece: jax.Array, sums: PackedLanes) -> PackedLanes:
            column = (step * count + piece) * LEAST_COLUMNS + lax.broadcasted_iota(jnp.int32, (1, LEAST_COLUMNS), 1)
            return multiply(tuple(pick(part, piece) for part in pieces), column, sums)

        return lax.fori_loop(0, count, add_piece, sums)

    nothing = (jnp.zeros((change.tokens, target_column.size), jnp.float32),) * target.packed_lanes
    return lax.fori_loop(0, -(-source.width // columns), add, nothing)


def _multiply(
    source: VectorBlock,
    target: Codec,
    change: _Change,
    matrix: Ref,
    target_column: jax.Array,
    words: tuple[jax.Array, ...],
    column: jax.Array,
    sums: PackedLanes,
) -> PackedLanes:
    """Adds what words of some columns, times their rows of the matrix, give to each packed lane of the target."""
    width, source_width = target.width(source.geometry), source.width
    product = functools.partial(jnp.dot, precision=exact_product(interpret=change.interpret))
    row = jnp.minimum(column, source_width - 1).reshape(-1, 1)
    for i, lane in enumerate(source.unpack(words, column)):
        part = (
            jnp.where(column < source_width, lane, 0.0)
            if source_width % change.columns_at_a_time(source.codec)
            else lane
        )
        places = [(i * source_width + row, j * width + target_column) for j in range(target.packed_lanes)]
        blocks = [load(at(matrix, *place)) for place in places]
        sums = tuple(acc + product(part, block) for acc, block in zip(sums, blocks, strict=True))
    return sums
