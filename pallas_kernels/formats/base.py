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

Planes = tuple[jax.Array, ...]


class PageWords(NamedTuple):
    """Encoded pages. Leading axes are free: heads, pages, rows, or none.

    Attributes:
        k, v: u16[..., T, width] each, `KVFormat.word_parts` of them: the words of the keys and of the values.
        aux: u16[...] each, as `KVFormat.aux` lists them: [..., T, 1], [..., 1, width] or [..., 1, 1].
    """

    k: Planes
    v: Planes
    aux: Planes


class PageVectors(NamedTuple):
    """Keys and values as far as reading needs to undo their encoding. Leading axes are free.

    A vector lies in planes, contiguous slices of it. Where one scale covers a whole vector it stays a factor, because
    it can multiply a logit or a weight instead of every value: key = concat(k) * k_scale, value = concat(v) * v_scale +
    v_offset. None: no such factor.

    Attributes:
        k, v: f32[..., T, width], `KVFormat.planes` of them; of `v`, finite for any words if there is a scale.
        k_scale, v_scale, v_offset: f32[..., T, 1].
    """

    k: Planes
    v: Planes
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    v_offset: jax.Array | None = None

    def join(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values, f32[..., T, head_dim]."""
        k, v = self.scaled_planes()
        return jnp.concatenate(k, axis=-1), jnp.concatenate(v, axis=-1)

    def scaled_planes(self) -> tuple[Planes, Planes]:
        """The planes of keys and of values, scales and offsets applied."""
        k, v = self.k, self.v
        if self.k_scale is not None:
            k = tuple(plane * self.k_scale for plane in k)
        if self.v_scale is not None:
            v = tuple(plane * self.v_scale for plane in v)
        if self.v_offset is not None:
            v = tuple(plane + self.v_offset for plane in v)
        return k, v


class KVFormat(FormatSizes, ABC):
    """A KV precision as a codec, with its sizes. Stateless; one instance is registered under `name`."""

    @abstractmethod
    def encode(self, k: Planes, v: Planes) -> PageWords:
        """Encodes vectors that are in the format's basis, keys and values independently of each other.

        Args:
            k, v: `planes` of f32[..., T, width].
        """

    def read_aux(self, aux: Planes) -> Planes:
        """The auxiliary parts, u16 or wider integers, as the numbers that `unpack` needs: f32 of like shapes.

        Apart from `unpack` so that XLA can be kept from computing a scale again for each value it covers.
        """
        return ()

    @abstractmethod
    def unpack(self, k: Planes, v: Planes, numbers: Planes) -> PageVectors:
        """What words stand for, in the format's own basis (see `rotation`), scales left as factors.

        Where every word is 0, auxiliary parts included, it must be finite: kernels read unused tokens so.

        Args:
            k, v: the words, u16[..., T, width]; kernels may give them as wider integers of the same values.
            numbers: what `read_aux` gave. Kernels may have spread the parts to any shape that broadcasts, [T, width]
                included, so this must not rely on their shapes.
        """

    def rotation(self, head_dim: int) -> np.ndarray | None:
        """f32[head_dim, head_dim], orthogonal: vector @ rotation is how this format keeps it. None: as it is.

        A rotation can make the quantisation error smaller. Logits need only the query rotated too, and attention is
        linear in the values, so both ways are taken once per query and not once per token.
        """
        return None

    def to_basis(self, vectors: jax.Array) -> jax.Array:
        """Maps f32[..., head_dim] from the model's basis to the format's."""
        rotation = self.rotation(vectors.shape[-1])
        return vectors if rotation is None else jnp.matmul(vectors, rotation, precision=lax.Precision.HIGHEST)

    def from_basis(self, vectors: jax.Array) -> jax.Array:
        """The inverse of `to_basis`."""
        rotation = self.rotation(vectors.shape[-1])
        return vectors if rotation is None else jnp.matmul(vectors, rotation.T, precision=lax.Precision.HIGHEST)

    def encode_vectors(self, k: jax.Array, v: jax.Array) -> PageWords:
        """Encodes f32[..., T, head_dim] keys and values of the model's basis."""
        k_planes, v_planes = (jnp.split(self.to_basis(part), self.planes, axis=-1) for part in (k, v))
        return self.encode(tuple(k_planes), tuple(v_planes))

    def decode_vectors(self, words: PageWords) -> tuple[jax.Array, jax.Array]:
        """The f32[..., T, head_dim] keys and values, in the model's basis, that `words` stand for."""
        k, v = self.unpack(words.k, words.v, self.read_aux(words.aux)).join()
        return self.from_basis(k), self.from_basis(v)
