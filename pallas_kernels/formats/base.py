"""What a KV format is: a codec for keys and one for values, each of which turns vectors into 16-bit words, and back.

All of a codec's code is elementwise, but for minima and maxima over a page's tokens or a vector's channels. So the
same code runs on whole batches in XLA, on a tile inside a Triton kernel and on a vector register inside a Mosaic one.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fineserve_jax.pallas_kernels.format_sizes import CodecSizes, FormatSizes

PackedLanes = tuple[jax.Array, ...]
SIDES = KEYS, VALUES = 0, 1


class EncodedVectors(NamedTuple):
    """The keys of pages as words, or their values. Leading axes are free: heads, pages, rows, or none.

    Attributes:
        words: u16[..., T, width] each, `Codec.word_parts` of them.
        scales: u16[...] each, as `Codec.scales` lists them: [..., T, 1], [..., 1, width] or [..., 1, 1].
    """

    words: PackedLanes
    scales: PackedLanes = ()


class PageWords(NamedTuple):
    """Encoded pages: their keys and their values."""

    k: EncodedVectors
    v: EncodedVectors


class UnpackedVectors(NamedTuple):
    """Keys or values as far as reading needs to undo their encoding. Leading axes are free.

    A vector lies in packed lanes, contiguous slices of it. Where one scale covers a whole vector it stays a factor,
    because it can multiply a logit or a weight instead of every value: vector = concat(lanes) * scale + zero_point. A
    zero point here is the number that code 0 stands for. None: no such factor.

    Attributes:
        lanes: f32[..., T, width], `Codec.packed_lanes` of them; finite for any words if there is a scale.
        scale, zero_point: f32[..., T, 1].
    """

    lanes: PackedLanes
    scale: jax.Array | None = None
    zero_point: jax.Array | None = None

    def scaled_lanes(self) -> PackedLanes:
        """The packed lanes, scale and zero point applied."""
        lanes = self.lanes
        if self.scale is not None:
            lanes = tuple(lane * self.scale for lane in lanes)
        if self.zero_point is not None:
            lanes = tuple(lane + self.zero_point for lane in lanes)
        return lanes

    def join(self) -> jax.Array:
        """The vectors, f32[..., T, head_dim]."""
        return jnp.concatenate(self.scaled_lanes(), axis=-1)


class PageVectors(NamedTuple):
    """Keys and values of pages. Keys have no zero point as a factor."""

    k: UnpackedVectors
    v: UnpackedVectors


class Codec(CodecSizes, ABC):
    """How keys, or values, are kept. Stateless."""

    @abstractmethod
    def encode(self, lanes: PackedLanes) -> EncodedVectors:
        """Encodes vectors that are rotated as the codec keeps them.

        Args:
            lanes: `packed_lanes` of f32[..., T, width].
        """

    def read_scales(self, scales: PackedLanes) -> PackedLanes:
        """The scales and zero points that `unpack` needs, f32, of `EncodedVectors.scales`, u16 or wider.

        Apart from `unpack` so that XLA can be kept from computing a scale again for each value it covers.
        """
        return ()

    @abstractmethod
    def unpack(self, words: PackedLanes, scales: PackedLanes) -> UnpackedVectors:
        """What words stand for, rotated as the codec keeps vectors, scales of whole vectors left as factors.

        Where every word is 0, those of scales included, it must be finite: kernels read unused tokens so.

        Args:
            words: u16[..., T, width]; kernels may give them as wider integers of the same values.
            scales: what `read_scales` gave. Kernels may have spread the arrays to any shape that broadcasts, [T, width]
                included, so this must not rely on their shapes.
        """

    def rotation(self, head_dim: int) -> np.ndarray | None:
        """f32[head_dim, head_dim], orthogonal: vector @ rotation is how this codec keeps it. None: as it is.

        A rotation can make the quantisation error smaller. Logits need only the query rotated too, and attention is
        linear in the values, so both ways are taken once per query and not once per token.
        """
        return None

    def rotate(self, vectors: jax.Array) -> jax.Array:
        """f32[..., head_dim] vectors of the model as the codec keeps them."""
        rotation = self.rotation(vectors.shape[-1])
        return vectors if rotation is None else jnp.matmul(vectors, rotation, precision=lax.Precision.HIGHEST)

    def unrotate(self, vectors: jax.Array) -> jax.Array:
        """The inverse of `rotate`."""
        rotation = self.rotation(vectors.shape[-1])
        return vectors if rotation is None else jnp.matmul(vectors, rotation.T, precision=lax.Precision.HIGHEST)

    def encode_vectors(self, vectors: jax.Array) -> EncodedVectors:
        """Encodes f32[..., T, head_dim] vectors of the model."""
        return self.encode(tuple(jnp.split(self.rotate(vectors), self.packed_lanes, axis=-1)))

    def decode_vectors(self, encoded: EncodedVectors) -> jax.Array:
        """The f32[..., T, head_dim] vectors of the model that words stand for."""
        return self.unrotate(self.unpack(encoded.words, self.read_scales(encoded.scales)).join())


class KVFormat(FormatSizes):
    """A KV precision: a codec of keys and one of values, with a name. Compared by identity: one is registered."""

    key: Codec
    value: Codec

    def __init__(self, key: Codec, value: Codec, name: str | None = None) -> None:
        """`name`: what users write; None: that of both codecs, or one made of theirs, such as `k8v4`."""
        super().__init__(key, value, name)

    @property
    def sides(self) -> tuple[Codec, Codec]:
        """The codecs of keys and of values."""
        return self.key, self.value

    def unpack(self, words: PageWords, scales: tuple[PackedLanes, PackedLanes]) -> PageVectors:
        """What words of pages stand for; `scales`: what the codecs' `read_scales` gave of keys and of values."""
        k, v = (codec.unpack(side.words, own) for codec, side, own in zip(self.sides, words, scales, strict=True))
        return PageVectors(k if k.zero_point is None else UnpackedVectors(k.scaled_lanes()), v)

    def encode_vectors(self, k: jax.Array, v: jax.Array) -> PageWords:
        """Encodes f32[..., T, head_dim] keys and values of the model."""
        return PageWords(self.key.encode_vectors(k), self.value.encode_vectors(v))

    def decode_vectors(self, words: PageWords) -> tuple[jax.Array, jax.Array]:
        """The f32[..., T, head_dim] keys and values of the model that `words` stand for."""
        return self.key.decode_vectors(words.k), self.value.decode_vectors(words.v)
