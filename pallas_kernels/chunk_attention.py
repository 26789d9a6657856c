"""Attention of prefill chunks, and of drafts, among a step's own tokens.

A step's chunks lie side by side on one token axis of C slots, each starting at a multiple of the page size, so that a
slot's page is `slot // page_size`.
"""

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import PageVectors, UnpackedVectors
from fineserve_jax.pallas_kernels.softmax import PartialAttention
from fineserve_jax.pallas_kernels.xla.dense_attention import attend


def attend_within(
    q: jax.Array,
    own_page: tuple[jax.Array, jax.Array],
    earlier_pages: tuple[jax.Array, jax.Array],
    chunk_of_page: jax.Array,
    window: int | None = None,
    soft_cap: float | None = None,
    branches: jax.Array | None = None,
) -> PartialAttention:
    """Causal attention of each chunk's tokens to themselves.

    A token sees the keys and values of its own page as they are kept until the page is full, and those of earlier
    pages as they are kept from then on: just what decoding token by token would read.

    Args:
        q: f32[C, kv_heads, group, head_dim], already multiplied by the softmax scale.
        own_page: k and v, f32[kv_heads, pages, T, head_dim].
        earlier_pages: k and v, the same shape.
        chunk_of_page: i32[pages], the chunk that each page of slots belongs to; any two unused pages may share -1.
        window, soft_cap: see `AttentionSpec`.
        branches: i32[C], of each slot the branch of its chunk that it is of; 0: of none. Branches are as in tree
            attention (SpecInfer, arXiv 2305.09781), of one level: a token does not see those of other branches. Slots
            are then no positions: without a window, and where pages are kept the same before and after they are full.
            None: nobody is of one.

    Returns:
        of f32[C, kv_heads, group].

    Raises:
        ValueError: branches, and a window.
    """
    if branches is not None and window is not None:
        raise ValueError(f"branches, and window={window}: slots of branches do not tell how far back positions are")
    seen = _attend_heads(q.swapaxes(0, 1), own_page, earlier_pages, chunk_of_page, window, soft_cap, branches)
    return PartialAttention(*(part.swapaxes(0, 1) for part in seen))


def _attend_heads(
    q: jax.Array,
    own_page: tuple[jax.Array, jax.Array],
    earlier_pages: tuple[jax.Array, jax.Array],
    chunk_of_page: jax.Array,
    window: int | None,
    soft_cap: float | None,
    branches: jax.Array | None,
) -> PartialAttention:
    """The same with heads first: q f32[kv_heads, C, group, head_dim]."""
    kv_heads, pages, page_size, head_dim = own_page[0].shape
    group = q.shape[2]
    ahead = jnp.arange(page_size)[:, None] - jnp.arange(page_size)
    seen = (ahead >= 0) & _within(ahead, window)
    if branches is not None:
        by_page = branches.reshape(pages, page_size)
        seen = seen & _on_its_way(by_page[:, :, None], by_page[:, None])
    seen = jnp.repeat(seen, group, axis=-2)
    paged = q.reshape(kv_heads, pages, page_size * group, head_dim)
    own = _regroup(attend(paged, _vectors(own_page), seen, soft_cap), q)
    if pages == 1:
        return own
    same_chunk = chunk_of_page[:, None] == chunk_of_page
    earlier = jnp.arange(pages)[:, None] > jnp.arange(pages)
    visible = jnp.repeat(jnp.repeat(same_chunk & earlier, page_size * group, axis=0), page_size, axis=1)
    if window is not None:
        slots = jnp.arange(pages * page_size)  # of one chunk, they are as far apart as its positions
        visible &= jnp.repeat(_within(slots[:, None] - slots, window), group, axis=0)
    if branches is not None:
        visible &= jnp.repeat(_on_its_way(branches[:, None], branches), group, axis=0)
    k, v = (part.reshape(kv_heads, pages * page_size, head_dim) for part in earlier_pages)
    return own.merge(_regroup(attend(_ungroup(q), _vectors((k, v)), visible, soft_cap), q))


def attend_ahead(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    sequences: jax.Array,
    positions: jax.Array,
    window: int | None = None,
    soft_cap: float | None = None,
) -> PartialAttention:
    """Attention of each row to the rows of its sequence that are ahead of it, itself not among them.

    Args:
        q: f32[rows, kv_heads, group, head_dim], already multiplied by the softmax scale.
        k, v: f32[rows, kv_heads, head_dim], as they are kept.
        sequences, positions: i32[rows]; rows of one sequence have different positions.
        window, soft_cap: see `AttentionSpec`.

    Returns:
        of f32[rows, kv_heads, group].
    """
    ahead = positions[:, None] - positions
    visible = (sequences[:, None] == sequences) & (ahead > 0) & _within(ahead, window)
    keys_and_values = _vectors((k.swapaxes(0, 1), v.swapaxes(0, 1)))
    seen = attend(_ungroup(q.swapaxes(0, 1)), keys_and_values, jnp.repeat(visible, q.shape[2], axis=0), soft_cap)
    return PartialAttention(*(part.swapaxes(0, 1) for part in _regroup(seen, q.swapaxes(0, 1))))


def _within(ahead: jax.Array, window: int | None) -> jax.Array:
    """Whether keys so many positions back lie in the window."""
    return jnp.ones_like(ahead, bool) if window is None else ahead < window


def _on_its_way(queries: jax.Array, keys: jax.Array) -> jax.Array:
    """Whether keys are of no branch, or of the queries' own."""
    return (keys == 0) | (keys == queries)


def without_spreading(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values as they are. A token whose values are not finite has 0 for values and NaN for keys instead: the
    queries that see it get NaN either way, while 0 * NaN would spread it to those that do not, other requests' too."""
    finite = jnp.isfinite(v).all(axis=-1, keepdims=True)
    return jnp.where(finite, k, jnp.nan), jnp.where(finite, v, 0.0)


def _vectors(keys_and_values: tuple[jax.Array, jax.Array]) -> PageVectors:
    k, v = without_spreading(*keys_and_values)
    return PageVectors(UnpackedVectors((k,)), UnpackedVectors((v,)))


def _ungroup(q: jax.Array) -> jax.Array:
    """f32[kv_heads, C, group, head_dim] -> f32[kv_heads, C * group, head_dim]."""
    return q.reshape(q.shape[0], -1, q.shape[-1])


def _regroup(part: PartialAttention, q: jax.Array) -> PartialAttention:
    """The attention of `q` f32[kv_heads, C, group, head_dim] from that of its queries in any other arrangement."""
    heads = q.shape[:3]
    return PartialAttention(part.m.reshape(heads), part.l.reshape(heads), part.acc.reshape(q.shape))
