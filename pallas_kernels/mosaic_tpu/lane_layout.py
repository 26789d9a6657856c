"""How the heads-first words of a page lie in rows of 128 lanes, the form in which a TPU holds them.

A head block of H heads is a run of H * T vectors of W words. Where W divides 128 several vectors share a row; elsewhere
they straddle rows, in a pattern that repeats: a group of `period` rows holds exactly `sharing` vectors.

W = 32, sharing 4, period 1:

    | vector 0 | vector 1 | vector 2 | vector 3 |           group 0
    | vector 4 | vector 5 | vector 6 | vector 7 |           group 1

W = 96, sharing 4, period 3:

    | vector 0                      | vector 1 ...          group 0, phase 0
       ... vector 1         | vector 2                      group 0, phase 1
                    | vector 3                      |       group 0, phase 2

Row i * period + j is phase j of group i; the vectors of group i are i * sharing + b. So all vectors with the same b lie
in the same lanes of the same phases, and one arrangement of the query, zero in all other lanes, serves them all.

Keys and values of a format are grouped alike, though their codecs differ: a group holds whole rows of both. Then the
logits that a group of keys gives are the weights of a group of values.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import KEYS, VALUES, Codec, KVFormat
from fineserve_jax.pallas_kernels.geometry import TPU_TILE, PageGeometry

SUBLANES, LANES = TPU_TILE
TILE_WORDS = SUBLANES * LANES
NOWHERE = 1 << 30  # the index in its segment of what is no token


@dataclass(frozen=True)
class LaneLayout:
    """The rows of the keys, or of the values, of a head block in a few pages of one format, joined page after page.

    Attributes:
        codec: of the keys, or values.
        geometry: of the pages.
        heads: heads of a head block; blocks are taken one after the other.
        pages: pages at a time.
        sharing: vectors of a group.
        start: where in a page's layer they begin, in words.
        scale_starts: the same of each scale array.
    """

    codec: Codec
    geometry: PageGeometry
    heads: int
    pages: int
    sharing: int
    start: int
    scale_starts: tuple[int, ...]

    @cached_property
    def words(self) -> int:
        """Words of a vector (W)."""
        return self.codec.vector_words(self.geometry)

    @cached_property
    def width(self) -> int:
        """Words of each of a vector's parts."""
        return self.codec.width(self.geometry)

    @cached_property
    def period(self) -> int:
        """Rows of a group."""
        return self.sharing * self.words // LANES

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """The phases in which values begin; others hold only further parts of values (as in fp32)."""
        starts = {(vector * self.words + lane) // LANES for vector in range(self.sharing) for lane in range(self.width)}
        return tuple(sorted(starts))

    @cached_property
    def vectors(self) -> int:
        """Vectors of a page's head block."""
        return self.heads * self.geometry.page_size

    @cached_property
    def page_groups(self) -> int:
        """Groups read of a page's head block: whole tiles. What lies beyond the block's own belongs to no token."""
        return _round_up(-(-self.vectors // self.sharing), SUBLANES)

    @cached_property
    def groups(self) -> int:
        """Groups of all pages."""
        return self.pages * self.page_groups

    @cached_property
    def num_head_blocks(self) -> int:
        return self.geometry.kv_heads // self.heads

    @cached_property
    def num_packed_lanes(self) -> int:
        """Arrangements of 128 lanes that a vector's values lie in: packed lanes of each phase."""
        return len(self.phases) * self.codec.packed_lanes

    @property
    def splits_evenly(self) -> bool:
        """Whether each head block fills whole tiles, so that blocks can be told apart by their tile alone."""
        whole = self.vectors % (self.sharing * SUBLANES) == 0 and self.vectors * self.words % TILE_WORDS == 0
        return self.geometry.kv_heads % self.heads == 0 and (whole or self.heads == self.geometry.kv_heads)

    # -- what lies where: i32 arrays for inside the kernel -------------------------------------------------------

    def lane_vector(self, phase: int, shape: tuple[int, int], axis: int) -> tuple[jax.Array, jax.Array]:
        """Of every lane, which vector of its group it belongs to, and which word of that vector it is."""
        flat = phase * LANES + lax.broadcasted_iota(jnp.int32, shape, axis)
        vector = divide(flat, self.words)
        return vector, flat - vector * self.words

    def places(self, phase: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of every word of a phase, i32[groups, 128]: head in the block, token in the joined pages, word in the vector.

        `NOWHERE` is the token of words that begin no value, too.
        """
        shape = (self.groups, LANES)
        vector, word = self.lane_vector(phase, shape, 1)
        head, token = self._head_and_token(lax.broadcasted_iota(jnp.int32, shape, 0), vector)
        return head, jnp.where(word < self.width, token, NOWHERE), word

    def columns(self) -> tuple[jax.Array, jax.Array]:
        """Of vector b of every group, i32[sharing, groups]: head in the block, and token in the joined pages."""
        shape = (self.sharing, self.groups)
        group, vector = lax.broadcasted_iota(jnp.int32, shape, 1), lax.broadcasted_iota(jnp.int32, shape, 0)
        return self._head_and_token(group, vector)

    def _head_and_token(self, group: jax.Array, vector: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`NOWHERE` is the token of vectors beyond the block; their head is beyond the block's too."""
        page = divide(group, self.page_groups)
        flat = (group - page * self.page_groups) * self.sharing + vector
        head = divide(flat, self.geometry.page_size)
        token = page * self.geometry.page_size + flat - head * self.geometry.page_size
        return head, jnp.where(head < self.heads, token, NOWHERE)

    def lane_selector(self, phase: int, packed_lane: int, dtype: jnp.dtype) -> jax.Array:
        """[head_dim, 128], 1 where a lane of the phase has a value of the packed lane, so that q @ this arranges q."""
        shape = (self.geometry.head_dim, LANES)
        _, word = self.lane_vector(phase, shape, 1)
        value = jnp.where(word < self.width, word + packed_lane * self.width, NOWHERE)
        return (lax.broadcasted_iota(jnp.int32, shape, 0) == value).astype(jnp.float32).astype(dtype)


@dataclass(frozen=True)
class PageLayout:
    """How the pages of a format lie: keys and values, see `LaneLayout`."""

    kv_format: KVFormat
    geometry: PageGeometry
    heads: int
    pages: int

    @cached_property
    def sides(self) -> tuple[LaneLayout, LaneLayout]:
        """The layouts of keys and of values."""
        geometry, kv_format = self.geometry, self.kv_format
        sharing = math.lcm(*(LANES // math.gcd(codec.vector_words(geometry), LANES) for codec in kv_format.sides))
        starts, scale_starts = kv_format.block_starts(geometry), kv_format.scale_starts(geometry)
        keys, values = (
            LaneLayout(codec, geometry, self.heads, self.pages, sharing, starts[side], scale_starts[side])
            for side, codec in enumerate(kv_format.sides)
        )
        return keys, values

    @property
    def keys(self) -> LaneLayout:
        return self.sides[KEYS]

    @property
    def values(self) -> LaneLayout:
        return self.sides[VALUES]

    @property
    def splits_evenly(self) -> bool:
        """See `LaneLayout`."""
        return all(side.splits_evenly for side in self.sides)


def divide(dividend: jax.Array, divisor: int) -> jax.Array:
    """Quotients, rounded down, of i32 below 2**20. A vector unit has no integer division."""
    if divisor & (divisor - 1) == 0:
        return dividend >> divisor.bit_length() - 1
    return ((dividend.astype(jnp.float32) + 0.5) * (1 / divisor)).astype(jnp.int32)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
