"""What a KV format is: how vectors of keys and values become 16-bit words, and back."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.geometry import PageGeometry


class PageWords(NamedTuple):
    """Encoded pages of one layer. Axes before `pages` are free (kernels put rows there).

    Attributes:
        k: u16[..., kv_heads, pages, T, W], the words of the keys.
        v: u16[..., kv_heads, pages, T, W], the words of the values.
        aux: u16[..., pages, aux_words], scales and whatever else the format needs to decode a page.
    """

    k: jax.Array
    v: jax.Array
    aux: jax.Array


class PageVectors(NamedTuple):
    """Keys and values as far as reading needs to undo their encoding. Axes as in `PageWords`.

    A vector lies in planes, contiguous slices of it. Where one scale covers a whole vector it stays a factor, because
    it can multiply a logit or a weight instead of every value: key = concat(k) * k_scale, value = concat(v) * v_scale +
    v_offset. None: no such factor.

    Attributes:
        k, v: f32[..., kv_heads, pages, T, head_dim / planes] each; of `v`, integers if there is a scale.
        k_scale, v_scale, v_offset: f32[..., kv_heads, pages, T].
    """

    k: tuple[jax.Array, ...]
    v: tuple[jax.Array, ...]
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    v_offset: jax.Array | None = None

    def join(self) -> tuple[jax.Array, jax.Array]:
        """Keys and values, f32[..., kv_heads, pages, T, head_dim]."""
        k, v = jnp.concatenate(self.k, axis=-1), jnp.concatenate(self.v, axis=-1)
        if self.k_scale is not None:
            k = k * self.k_scale[..., None]
        if self.v_scale is not None:
            v = v * self.v_scale[..., None]
        return k, v if self.v_offset is None else v + self.v_offset[..., None]


class KVFormat(ABC):
    """A KV precision as a codec. Stateless; one instance is registered under `name`.

    Attributes:
        name: what users write, e.g. "int8".
        value_bits: bits of one stored value, scales not counted; a power of two from 1 to 32.
        tail: None if every token is encoded by itself. Otherwise the name of the (token-wise) format that holds a
            page's tokens until the page is full and can be encoded as a whole.
    """

    name: str
    value_bits: int
    tail: str | None = None

    def vector_words(self, geometry: PageGeometry) -> int:
        """Words (W) of one head vector."""
        return geometry.head_dim * self.value_bits // 16

    @abstractmethod
    def aux_words(self, geometry: PageGeometry) -> int:
        """Words of scales and the like a page needs per layer.

        A token-wise format has `aux_planes` numbers per token and head, laid out `[aux_planes, kv_heads, T]`, so that
        a single token's can be written by itself.
        """

    @abstractmethod
    def encode(self, geometry: PageGeometry, k: jax.Array, v: jax.Array) -> PageWords:
        """Encodes pages.

        Args:
            geometry: `geometry.page_size` tokens a page; token-wise formats also take pages of one token.
            k, v: f32[..., kv_heads, pages, T, head_dim].
        """

    @abstractmethod
    def unpack(self, geometry: PageGeometry, words: PageWords) -> PageVectors:
        """What `words` stand for, in the format's own basis (see `to_basis`), scales left as factors."""

    def decode(self, geometry: PageGeometry, words: PageWords) -> tuple[jax.Array, jax.Array]:
        """The f32[..., kv_heads, pages, T, head_dim] keys and values that `words` stand for, in the format's basis."""
        return self.unpack(geometry, words).join()

    def to_basis(self, vectors: jax.Array) -> jax.Array:
        """Maps f32[..., head_dim] from the model's basis to the one this format keeps keys and values in.

        A format may keep them rotated, for a smaller quantisation error. Logits need only the query in the same basis,
        and attention is linear in the values, so both ways are taken once per query and not once per token.
        """
        return vectors

    def from_basis(self, vectors: jax.Array) -> jax.Array:
        """The inverse of `to_basis`, which is orthogonal."""
        return vectors

    def units_per_layer(self, geometry: PageGeometry) -> int:
        """Arena units of one layer of a page."""
        return -(-self.words_per_layer(geometry) // geometry.unit_words)

    def page_units(self, geometry: PageGeometry) -> int:
        """Arena units of a page, all layers."""
        return geometry.num_layers * self.units_per_layer(geometry)

    def words_per_layer(self, geometry: PageGeometry) -> int:
        """Words that hold something: a layer of a page without its padding."""
        values = 2 * geometry.kv_heads * geometry.page_size * self.vector_words(geometry)
        return values + self.aux_words(geometry)

    def bits_per_value(self, geometry: PageGeometry) -> float:
        """Bits a cached value costs, scales and padding counted."""
        values = 2 * geometry.kv_heads * geometry.page_size * geometry.head_dim
        return 16 * self.units_per_layer(geometry) * geometry.unit_words / values


class TokenFormat(KVFormat):
    """A format whose tokens are encoded one by one.

    Attributes:
        aux_planes: 16-bit numbers kept per token and head besides the values.
    """

    aux_planes: int = 0

    def aux_words(self, geometry: PageGeometry) -> int:
        return self.aux_planes * geometry.kv_heads * geometry.page_size

    def join_aux(self, planes: list[jax.Array], k: jax.Array) -> jax.Array:
        """Planes of u16[..., kv_heads, pages, T] as one u16[..., pages, aux_words]; `k` gives the shape of none."""
        if not planes:
            *lead, _, pages, _, _ = k.shape
            return jnp.zeros((*lead, pages, 0), jnp.uint16)
        stacked = jnp.stack([jnp.moveaxis(plane, -2, -3) for plane in planes], axis=-3)
        return stacked.reshape(*stacked.shape[:-3], -1)

    def split_aux(self, geometry: PageGeometry, aux: jax.Array) -> list[jax.Array]:
        """The inverse of `join_aux`."""
        shape = (*aux.shape[:-1], self.aux_planes, geometry.kv_heads, geometry.page_size)
        planes = aux.reshape(shape)
        return [jnp.moveaxis(planes[..., i, :, :], -3, -2) for i in range(self.aux_planes)]
