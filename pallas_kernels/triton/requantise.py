"""Converting pages from one format to another in Triton.

A program takes one head of one layer of one page; if the target encodes tokens by themselves, only so many of its
tokens as fit in registers. It decodes the source's words, changes the basis if the two formats keep their vectors in
different ones, and encodes for the target. All arrays are [tokens, lanes], lanes being words of a vector. The target's
planes are slices of the head's channels, and so are the source's:

    source, 2 planes    | 0                             | 1                             |
    target, 4 planes    | 0             | 1             | 2             | 3             |

Values cannot be sliced or joined in Triton. Instead words are loaded that unpack to what is wanted: half of a vector's
words to halves of its planes; and twice all of them, one after the other, to planes twice as wide, of which each lane
then takes the right one.

Lanes are padded to a power of two by loading the last one again. Minima and maxima are not touched by that, and to
store it again is harmless.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.formats import Aux, KVFormat, PageWords, Planes
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params, when
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.triton.placing import at, clear_padding, load_words, padded, store_words

LANES_AT_A_TIME = 16  # contracted by one product; the fewest there can be
BLOCK_VALUES = 32 * 128  # keys, and as many values, that a program converts if it is free to choose
WARP_VALUES = 1024  # keys and values of a warp

Ref = Any


def requantise(
    arena: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    source_format: KVFormat,
    target_format: KVFormat,
    geometry: PageGeometry,
    *,
    interpret: bool,
) -> jax.Array:
    """Reads full pages in one format and writes what they hold to others in another. See `writing.requantise`."""
    units = arena.reshape(len(arena), -1)
    change = change_of_basis(source_format, target_format, geometry.head_dim)
    operands = [sources, targets, jnp.asarray(count, jnp.int32).reshape(1), units]
    if change is not None:
        operands.append(jnp.asarray(change))
    tokens = _tokens(target_format, geometry)
    launch = pallas_call(
        functools.partial(_kernel, source=source_format, target=target_format, geometry=geometry, tokens=tokens),
        grid=(len(sources), geometry.num_layers, geometry.kv_heads * (geometry.page_size // tokens)),
        out_shape=jax.ShapeDtypeStruct(units.shape, units.dtype),
        input_output_aliases={3: 0},
        compiler_params=triton_params(num_warps=_num_warps(2 * tokens * padded(geometry.head_dim)), num_stages=1),
        interpret=interpret,
        name="requantise",
    )
    return launch(*operands).reshape(arena.shape)


def _tokens(target: KVFormat, geometry: PageGeometry) -> int:
    """Tokens of a program: all of a page's if they have to be encoded together."""
    if target.tail is not None:
        return geometry.page_size
    return min(geometry.page_size, max(16, BLOCK_VALUES // padded(geometry.head_dim)))


def _num_warps(values: int) -> int:
    """Enough for a program's keys and values to fit in registers, or nearly. Many warps have few registers each."""
    return max(4, min(values // WARP_VALUES, 16), values // (2 * WARP_VALUES))


def change_of_basis(source: KVFormat, target: KVFormat, head_dim: int) -> np.ndarray | None:
    """f32[head_dim, head_dim], what turns the source's vectors into the target's: source @ this. None: nothing."""
    before, after = source.rotation(head_dim), target.rotation(head_dim)
    if before is None or after is None:
        return after if before is None else before.T
    return None if np.array_equal(before, after) else (before.T.astype(np.float64) @ after).astype(np.float32)


def _kernel(
    sources: Ref,
    targets: Ref,
    count: Ref,
    _arena_before: Ref,
    *refs: Ref,
    source: KVFormat,
    target: KVFormat,
    geometry: PageGeometry,
    tokens: int,
) -> None:
    *change, arena = refs
    item, layer, block = program_id(0), program_id(1), program_id(2)
    page = load(targets.at[item])
    blocks = geometry.page_size // tokens
    head = lax.div(block, blocks)
    token = lax.rem(block, blocks) * tokens + lax.broadcasted_iota(jnp.int32, (tokens, 1), 0)

    @when((item < count[0]) & (page < arena.shape[0]))
    def _() -> None:
        source_unit = load(sources.at[item]) + layer * source.units_per_layer(geometry)
        reader = _HeadOfPage(source, geometry, arena, source_unit, head, token)
        vectors = rotated(reader, target, *change) if change else resliced(reader, target)
        target_unit = page + layer * target.units_per_layer(geometry)
        _HeadOfPage(target, geometry, arena, target_unit, head, token).store(target.encode(*vectors))
        when(block == 0)(functools.partial(clear_padding, arena, target_unit, target, geometry))


@dataclass(frozen=True)
class _HeadOfPage:
    """Some tokens, i32[tokens, 1], of one head of one layer of a page in the arena."""

    kv_format: KVFormat
    geometry: PageGeometry
    arena: Ref
    first_unit: jax.Array
    head: jax.Array
    token: jax.Array

    @property
    def width(self) -> int:
        return self.kv_format.width(self.geometry)

    def places(self, lane: jax.Array) -> PageWords:
        """Where the words of some lanes, i32[1, lanes], lie: i32 for every array of `PageWords`, of the same shape."""
        geometry, kv_format = self.geometry, self.kv_format
        block = kv_format.block_words(geometry)
        first = self.head * block + self.token * kv_format.vector_words(geometry)
        k = tuple(first + (part * self.width + lane) for part in range(kv_format.word_parts))
        v = tuple(geometry.kv_heads * block + words for words in k)
        within = {Aux.TOKEN: self.token, Aux.CHANNEL: lane, Aux.PAGE: jnp.zeros((1, 1), jnp.int32)}
        starts, sizes = kv_format.aux_starts(geometry), kv_format.aux_sizes(geometry)
        aux = [
            start + self.head * size + within[kind]
            for kind, start, size in zip(kv_format.aux, starts, sizes, strict=True)
        ]
        return PageWords(k, v, tuple(aux))

    def load(self, lane: jax.Array) -> tuple[Planes, Planes]:
        """Planes of keys and of values, f32[tokens, lanes], in the format's basis; of some lanes, i32[1, lanes]."""
        words = jax.tree.map(functools.partial(load_words, self.arena, self.first_unit), self.places(lane))
        return self.kv_format.unpack(words.k, words.v, self.kv_format.read_aux(words.aux)).scaled_planes()

    def store(self, words: PageWords) -> None:
        lane = clamped_lanes(self.width)
        jax.tree.map(functools.partial(store_words, self.arena, self.first_unit), self.places(lane), words)


def clamped_lanes(width: int) -> jax.Array:
    """The lanes of a plane, i32[1, lanes]: a power of two of them, at least 16, the last of them over and over."""
    lane = lax.broadcasted_iota(jnp.int32, (1, padded(width)), 1)
    return lane if lane.size == width else jnp.minimum(lane, width - 1)


def resliced(reader: _HeadOfPage, target: KVFormat) -> tuple[Planes, Planes]:
    """The source's keys and values as planes of the target, which has the same basis."""
    width, source_width = target.width(reader.geometry), reader.width
    lane = clamped_lanes(width)
    if width <= source_width:
        slices = [reader.load(start + lane) for start in range(0, source_width, width)]

        def in_order(parts: list[Planes]) -> Planes:
            return tuple(part[plane] for plane in range(reader.kv_format.planes) for part in parts)

        return in_order([k for k, _ in slices]), in_order([v for _, v in slices])
    k, v = reader.load(lax.rem(lane, source_width))
    which, merged = lax.div(lane, source_width), width // source_width

    def merge(planes: Planes) -> jax.Array:
        return functools.reduce(lambda left, i: jnp.where(which < i, left, planes[i]), range(1, merged), planes[0])

    def merge_all(planes: Planes) -> Planes:
        return tuple(merge(planes[i : i + merged]) for i in range(0, len(planes), merged))

    return merge_all(k), merge_all(v)


def rotated(reader: _HeadOfPage, target: KVFormat, change: Ref) -> tuple[Planes, Planes]:
    """The source's keys and values times `change`, f32[head_dim, head_dim], as planes of the target."""
    width, source_width = target.width(reader.geometry), reader.width
    lane = clamped_lanes(width)
    at_once = lax.broadcasted_iota(jnp.int32, (1, LANES_AT_A_TIME), 1)

    def add(step: jax.Array, sums: tuple[Planes, Planes]) -> tuple[Planes, Planes]:
        wanted = step * LANES_AT_A_TIME + at_once
        inside, source_lane = wanted < source_width, jnp.minimum(wanted, source_width - 1)
        parts = [[jnp.where(inside, plane, 0.0) for plane in planes] for planes in reader.load(source_lane)]
        row, (k, v) = source_lane.reshape(-1, 1), sums
        for i, (k_part, v_part) in enumerate(zip(*parts, strict=True)):
            blocks = [load(at(change, i * source_width + row, j * width + lane)) for j in range(target.planes)]
            k = tuple(total + _product(k_part, block) for total, block in zip(k, blocks, strict=True))
            v = tuple(total + _product(v_part, block) for total, block in zip(v, blocks, strict=True))
        return k, v

    nothing = (jnp.zeros((reader.token.size, lane.size), jnp.float32),) * target.planes
    return lax.fori_loop(0, -(-source_width // LANES_AT_A_TIME), add, (nothing, nothing))


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, precision=lax.Precision.HIGHEST, preferred_element_type=jnp.float32)
