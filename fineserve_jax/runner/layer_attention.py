"""Attention of one layer of a step, and the encoded keys and values it leaves to be written.

Every token sees keys and values as they are kept: in its request's KV format, and, where that format encodes whole
pages, in the format's residual precision inside the token's own page. What a token sees thus depends on its position
alone, and not on how its prompt was cut into chunks, what was batched with it, or whether it was preempted and
recomputed.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.chunk_attention import attend_ahead, attend_within
from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.operations import paged_attention
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
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
    """The `attend` of one layer; after the call, `words` holds what it encoded.

    group: number of the layer's group.
    layer: i32[], number of the layer in its group.
    branches: i32[C], see `branch_numbers`; None: no chunk has any.
    """

    spec: StepSpec
    group: int
    layer: jax.Array
    arena: jax.Array
    inputs: StepInputs
    branches: jax.Array | None = None
    words: LayerWords = field(default_factory=lambda: LayerWords({}, {}))

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None = None) -> jax.Array:
        """q: f32[N, heads, D]; k, v: f32[N, kv_heads, D], N the decode rows and then the chunk slots.

        sinks: f32[heads], see `paged_attention`.
        """
        rows, kv_heads = self.spec.shape.rows, self.spec.geometry.kv_heads
        grouped = (q * self.spec.model.config.attention_scale).reshape(q.shape[0], kv_heads, -1, q.shape[-1])
        outputs = [self._decode(grouped[:rows], k[:rows], v[:rows], sinks)]
        if self.spec.shape.chunk_tokens:
            outputs.append(self._chunks(grouped[rows:], k[rows:], v[rows:], sinks))
        return jnp.concatenate(outputs).reshape(q.shape)

    def _decode(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        """q: f32[rows, kv_heads, group, D]; k, v: f32[rows, kv_heads, D]."""
        as_pages = [part.swapaxes(0, 1)[:, :, None] for part in (k, v)]
        words, stored = _round_trips(self.spec.token_formats, *as_pages)
        self.words.tokens.update(words)
        k, v = (part[:, :, 0].swapaxes(0, 1) for part in _select(stored, self.inputs.formats_of(self.group).decode))
        logit = jnp.sum(q * k[:, :, None], axis=-1)
        if (cap := self.spec.model.config.attention_soft_cap) is not None:
            logit = cap * jnp.tanh(logit / cap)
        own = PartialAttention(logit, jnp.ones_like(logit), jnp.broadcast_to(v[:, :, None], q.shape))
        group, decode = self.spec.groups[self.group], self.inputs.decode
        if self.spec.drafts:
            assert decode.sequences is not None, "a step with drafts says which rows are of one sequence"
            own = own.merge(attend_ahead(q, k, v, decode.sequences, decode.positions, group.window, cap))
        spec = self.spec.decode_attention(group)
        inputs = self.inputs.groups[self.group]
        own = own.merge(self._cached(spec, q, inputs.decode_tiles, sinks))
        if inputs.shared is not None:
            shared = self._cached(self.spec.shared_attention(group), q[inputs.shared.rows], inputs.shared.tiles, None)
            own = own.merge(PartialAttention(*(part[inputs.shared.places] for part in shared)))
        return own.output()

    def _chunks(self, q: jax.Array, k: jax.Array, v: jax.Array, sinks: jax.Array | None) -> jax.Array:
        """q: f32[C, kv_heads, group, D]; k, v: f32[C, kv_heads, D]."""
        geometry, chunk, group = self.spec.geometry, self.inputs.chunk, self.spec.groups[self.group]
        tiles = self.inputs.groups[self.group].chunk_tiles
        assert chunk is not None, "a step with chunk slots has chunk inputs"
        assert tiles is not None, "a step with chunk slots has chunk inputs"
        pages = (geometry.kv_heads, self.spec.chunk_pages, geometry.page_size, geometry.head_dim)
        exact = [part.swapaxes(0, 1).reshape(pages) for part in (k, v)]
        words, stored = _round_trips(self.spec.token_formats, *exact)
        formats = self.inputs.formats_of(self.group)
        own_page = _select(stored, formats.newest)
        paged_words, paged_stored = _round_trips(self.spec.paged_formats, *own_page)
        earlier_pages = _select(stored | paged_stored, formats.full)
        self.words.pages.update(words | paged_words)

        spec = self.spec.chunk_attention(group)
        what = (q, own_page, earlier_pages, chunk.chunk_of_page, spec.window, spec.soft_cap)
        if self.branches is None:
            own = get_backend(spec.implementation).attend_within(*what)
        else:  # which no backend has code of its own for
            own = attend_within(*what, self.branches)
        return own.merge(self._cached(spec, q, tiles, sinks)).output()

    def _cached(self, spec: AttentionSpec, q: jax.Array, tiles: Tiles, sinks: jax.Array | None) -> PartialAttention:
        """Attention of f32[N, kv_heads, group, D] queries to the cached tokens, and to the sinks."""
        heads = q.reshape(len(q), -1, q.shape[-1]).astype(self.spec.query_dtype)
        flat = paged_attention(spec, heads, self.arena, tiles, self.layer, sinks)
        return PartialAttention(*(part.reshape(*q.shape[:3], *part.shape[2:]) for part in flat))


def _round_trips(
    formats: dict[int, KVFormat], k: jax.Array, v: jax.Array
) -> tuple[dict[int, PageWords], dict[int, Vectors]]:
    """Pages f32[kv_heads, pages, T, D] in each format: the words, and the keys and values they stand for."""
    words = {i: kv_format.encode_vectors(k, v) for i, kv_format in formats.items()}
    return words, {i: kv_format.decode_vectors(words[i]) for i, kv_format in formats.items()}


def _select(stored: dict[int, Vectors], format_ids: jax.Array) -> Vectors:
    """Of each page (axis 1) the keys and values in the format that `format_ids` i32[pages] names."""
    ids = list(stored)
    k, v = stored[ids[0]]
    for i in ids[1:]:
        chosen = (format_ids == i)[:, None, None]
        k, v = jnp.where(chosen, stored[i][0], k), jnp.where(chosen, stored[i][1], v)
    return k, v
