"""Attention of one layer of a step, and the encoded keys and values it leaves to be written.

Every token sees keys and values as they are kept: in its request's KV format, and, where that format encodes whole
pages, in the format's tail precision inside the token's own page. What a token sees thus depends on its position alone,
and not on how its prompt was cut into chunks, what was batched with it, or whether it was preempted and recomputed.
"""

from dataclasses import dataclass, field
from dataclasses import replace as dataclass_replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords, TokenFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.xla import chunk as chunk_kernel
from fineserve_jax.pallas_kernels.xla import decode as decode_kernel
from fineserve_jax.runner.inputs import StepInputs
from fineserve_jax.runner.shapes import StepSpec

Vectors = tuple[jax.Array, jax.Array]


class LayerWords(NamedTuple):
    """What a layer leaves to be written.

    Attributes:
        tokens: per token-wise format id, the decode rows as pages of one token.
        pages: per format id, the chunks' pages; empty without chunks.
    """

    tokens: dict[int, PageWords]
    pages: dict[int, PageWords]


@dataclass
class LayerAttention:
    """The `attend` of one layer; after the call, `words` holds what it encoded."""

    spec: StepSpec
    layer: jax.Array
    arena: jax.Array
    inputs: StepInputs
    words: LayerWords = field(default_factory=lambda: LayerWords({}, {}))

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q: f32[N, heads, D]; k, v: f32[N, kv_heads, D], N the decode rows and then the chunk slots."""
        rows, kv_heads = self.spec.shape.rows, self.spec.geometry.kv_heads
        grouped = (q * self.spec.model.config.attention_scale).reshape(q.shape[0], kv_heads, -1, q.shape[-1])
        outputs = [self._decode(grouped[:rows], k[:rows], v[:rows])]
        if self.spec.shape.chunk_tokens:
            outputs.append(self._chunks(grouped[rows:], k[rows:], v[rows:]))
        return jnp.concatenate(outputs).reshape(q.shape)

    def _decode(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q: f32[rows, kv_heads, group, D]; k, v: f32[rows, kv_heads, D]."""
        own_page = dataclass_replace(self.spec.geometry, page_size=1)
        as_pages = [part.swapaxes(0, 1)[:, :, None] for part in (k, v)]
        words, stored = _round_trips(dict(self.spec.token_formats), own_page, *as_pages)
        self.words.tokens.update(words)
        k, v = (part[:, :, 0].swapaxes(0, 1) for part in _select(stored, self.inputs.decode.format_ids))
        logit = jnp.sum(q * k[:, :, None], axis=-1)
        own = PartialAttention(logit, jnp.ones_like(logit), jnp.broadcast_to(v[:, :, None], q.shape))
        seen = decode_kernel.extend_over_pages(
            own, q, self.arena, self.inputs.decode.tiles, self.layer, self.spec.formats, self.spec.geometry
        )
        return seen.output()

    def _chunks(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q: f32[C, kv_heads, group, D]; k, v: f32[C, kv_heads, D]."""
        geometry, chunk = self.spec.geometry, self.inputs.chunk
        assert chunk is not None, "a step with chunk slots has chunk inputs"
        pages = (geometry.kv_heads, self.spec.chunk_pages, geometry.page_size, geometry.head_dim)
        exact = [part.swapaxes(0, 1).reshape(pages) for part in (k, v)]
        words, stored = _round_trips(dict(self.spec.token_formats), geometry, *exact)
        own_page = _select(stored, chunk.newest_format_ids)
        paged_words, paged_stored = _round_trips(self.spec.paged_formats, geometry, *own_page)
        earlier_pages = _select(stored | paged_stored, chunk.full_format_ids)
        self.words.pages.update(words | paged_words)

        q = q.swapaxes(0, 1)
        seen = chunk_kernel.attend_within(q, own_page, earlier_pages, chunk.chunk_of_page)
        slots = jnp.repeat(chunk.chunk_of_page, geometry.page_size)
        seen = chunk_kernel.extend_over_pages(
            seen, q, slots, self.arena, chunk.tiles, self.layer, self.spec.formats, geometry
        )
        return seen.output().swapaxes(0, 1)


def _round_trips(
    formats: dict[int, TokenFormat] | dict[int, KVFormat], geometry: PageGeometry, k: jax.Array, v: jax.Array
) -> tuple[dict[int, PageWords], dict[int, Vectors]]:
    """Pages f32[kv_heads, pages, T, D] in each format: the words, and the keys and values they stand for."""
    words = {i: kv_format.encode(geometry, k, v) for i, kv_format in formats.items()}
    stored = {}
    for i, kv_format in formats.items():
        k_read, v_read = kv_format.decode(geometry, words[i])
        stored[i] = (kv_format.from_basis(k_read), kv_format.from_basis(v_read))
    return words, stored


def _select(stored: dict[int, Vectors], format_ids: jax.Array) -> Vectors:
    """Of each page (axis 1) the keys and values in the format that `format_ids` i32[pages] names."""
    ids = list(stored)
    k, v = stored[ids[0]]
    for i in ids[1:]:
        chosen = (format_ids == i)[:, None, None]
        k, v = jnp.where(chosen, stored[i][0], k), jnp.where(chosen, stored[i][1], v)
    return k, v
