"""What a KV format is: how vectors of keys and values become 16-bit words, and back.

All of a format's code is elementwise, but for minima and maxima over a page's tokens or a vector's channels. So the
same code runs on whole batches in XLA, on a tile inside a Triton kernel and on a vector register inside a Mosaic one.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import FormatSizes

PackedLanes = tuple[jax.Array, ...]


class PageWords(NamedTuple):
    """Encoded pages. Leading axes are free: heads, pages, rows, or none.

    Attributes:
        k, v: u16[..., T, width] each, `KVFormat.word_parts` of them: the words of the keys and of the values.
        scales: u16[...] each, as `KVFormat.scales` lists them: [..., T, 1], [..., 1, width] or [..., 1, 1].
    """

    k: PackedLanes
    v: PackedLanes
    scales: PackedLanes


class PageVectors(NamedTuple):
    """Keys and values as far as reading needs to undo their encoding. Leading axes are free.

    A vector lies in packed lanes, contiguous slices of it. Where one scale covers a whole vector it stays a factor,
    because it can multiply a logit or a weight instead of every value: key = concat(k) * k_scale, value = concat(v) *
    v_scale + v_zero_point. A zero point here is the number that code 0 stands for. None: no such factor.

    Attributes:
        k, v: f32[..., T, width], `KVFormat.packed_lanes` of them; of `v`, finite for any words if there is a scale.
        k_scale, v_scale, v_zero_point: f32[..., T, 1].
    """

    k: PackedLanes
    v: PackedLanes
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    v_zero_point: jax.Array | None = None

    def join(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values, f32[..., T, head_dim]."""
        k, v = self.scaled_lanes()
        return jnp.concatenate(k, axis=-1), jnp.concatenate(v, axis=-1)

    def scaled_lanes(self) -> tuple[PackedLanes, PackedLanes]:
        """The packed lanes of keys and of values, scales and zero points applied."""
        k, v = self.k, self.v
        if self.k_scale is not None:
            k = tuple(lane * self.k_scale for lane in k)
        if self.v_scale is not None:
            v = tuple(lane * self.v_scale for lane in v)
        if self.v_zero_point is not None:
            v = tuple(lane + self.v_zero_point for lane in v)
        return k, v


class KVFormat(FormatSizes, ABC):
    """A KV precision as a codec, with its sizes. Stateless; one instance is registered under `name`."""

    @abstractmethod
    def encode(self, k: PackedLanes, v: PackedLanes) -> PageWords:
        """Encodes vectors that are rotated as the format keeps them, keys and values independently of each other.

        Args:
            k, v: `packed_lanes` of f32[..., T, width].
        """

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        """The scales and zero points that `unpack` needs, f32, of `PageWords.scales`, u16 or wider, of like shapes.

        Apart from `unpack` so that XLA can be kept from computing a scale again for each value it covers.
        """
        return ()

    @abstractmethod
    def unpack(self, k: PackedLanes, v: PackedLanes, scales: PackedLanes) -> PageVectors:
        """What words stand for, rotated as the format keeps vectors, scales left as factors.

        Where every word is 0, those of scales included, it must be finite: kernels read unused tokens so.

        Args:
            k, v: the words, u16[..., T, width]; kernels may give them as wider integers of the same values.
            scales: what `read_scales` gave. Kernels may have spread the arrays to any shape that broadcasts, [T, width]
                included, so this must not rely on their shapes.
        """

    def rotation(self, head_dim: int) -> np.ndarray | None:
        """f32[head_dim, head_dim], orthogonal: vector @ rotation is how this format keeps it. None: as it is.

        A rotation can make the quantisation error smaller. Logits need only the query rotated too, and attention is
        linear in the values, so both ways are taken once per query and not once per token.
        """
        return None

    def rotate(self, vectors: jax.Array) -> jax.Array:
        """f32[..., head_dim] vectors of the model as the format keeps them."""
        rotation = self.rotation(vectors.shape[-1])
        return vectors if rotation is None else jnp.matmul(vectors, rotation, precision=lax.Precision.HIGHEST)

    def unrotate(self, vectors: jax.Array) -> jax.Array:
        """The inverse of `rotate`."""
        rotation = self.rotation(vectors.shape[-1])
        return vectors if rotation is None else jnp.matmul(vectors, rotation.T, precision=lax.Precision.HIGHEST)

    def encode_vectors(self, k: jax.Array, v: jax.Array) -> PageWords:
        """Encodes f32[..., T, head_dim] keys and values of the model."""
        k_lanes, v_lanes = (jnp.split(self.rotate(part), self.packed_lanes, axis=-1) for part in (k, v))
        return self.encode(tuple(k_lanes), tuple(v_lanes))

    def decode_vectors(self, words: PageWords) -> tuple[jax.Array, jax.Array]:
        """The f32[..., T, head_dim] keys and values of the model that `words` stand for."""
        k, v = self.unpack(words.k, words.v, self.read_scales(words.scales)).join()
        return self.unrotate(k), self.unrotate(v)
