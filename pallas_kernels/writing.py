"""Writing the arena: encode and scatter new keys and values, and convert pages from one format to another.

Everything here takes the arena and returns it changed; jit it with the arena donated, and the change is in place. One
program handles one format, all layers and any number of tokens or pages. What is directed to a page at `num_units` or
beyond is not written, so padding needs no branch.
"""

from types import ModuleType

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.formats import KVFormat, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import (
    Implementation,
    check_implementation,
    default_implementation,
    is_interpreted,
)
from fineserve_jax.pallas_kernels.xla import write as xla


def commit(
    arena: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    offsets: jax.Array,
    format_ids: jax.Array,
    formats: tuple[KVFormat, ...],
    geometry: PageGeometry,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Encodes one new token for each of N rows, every row in its own format, and writes them.

    Args:
        arena: u16[num_units, *unit_shape].
        k, v: f32 or bf16[layers, kv_heads, N, head_dim].
        pages, offsets: i32[N], each token's page, and its place in it.
        format_ids: i32[N], index into `formats`.
        formats: token-wise formats. A page-wise one takes whole pages: see `commit_pages`.

    Raises:
        ValueError: one of the formats is page-wise.
    """
    for format_id, kv_format in enumerate(formats):
        if kv_format.residual is not None:
            raise ValueError(
                f"{kv_format.name} encodes whole pages; write new tokens in {kv_format.residual}, and full pages "
                "with commit_pages or requantize"
            )
        words = kv_format.encode_vectors(*(part.astype(jnp.float32)[..., None, :] for part in (k, v)))
        own = jnp.where(format_ids == format_id, pages, NOWHERE)
        arena = write_tokens(
            arena, words, own, offsets, kv_format, geometry, implementation=implementation, interpret=interpret
        )
    return arena


def commit_pages(
    arena: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pages: jax.Array,
    format_ids: jax.Array,
    formats: tuple[KVFormat, ...],
    geometry: PageGeometry,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Encodes whole pages, each in its own format, and writes them.

    Args:
        arena: u16[num_units, *unit_shape].
        k, v: f32 or bf16[layers, kv_heads, pages, T, head_dim].
        pages: i32[pages], first units.
        format_ids: i32[pages], index into `formats`.
    """
    for format_id, kv_format in enumerate(formats):
        words = kv_format.encode_vectors(*(part.astype(jnp.float32) for part in (k, v)))
        own = jnp.where(format_ids == format_id, pages, NOWHERE)
        arena = write_pages(arena, words, own, kv_format, geometry, implementation=implementation, interpret=interpret)
    return arena


def write_tokens(
    arena: jax.Array,
    words: PageWords,
    pages: jax.Array,
    offsets: jax.Array,
    kv_format: KVFormat,
    geometry: PageGeometry,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Writes one encoded token into each of N pages. No two may go to the same page.

    Args:
        arena: u16[num_units, *unit_shape].
        words: of pages of one token: u16[layers, kv_heads, N, 1, width], auxiliary parts [layers, kv_heads, N, 1, 1].
        pages: i32[N], first units.
        offsets: i32[N], the token's place in its page.
        kv_format: a token-wise format.
    """
    name, options = _resolve(implementation, interpret)
    return _writer(name).write_tokens(arena, words, pages, offsets, kv_format, geometry, **options)


def write_pages(
    arena: jax.Array,
    words: PageWords,
    pages: jax.Array,
    kv_format: KVFormat,
    geometry: PageGeometry,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Writes whole encoded pages, all layers.

    Args:
        arena: u16[num_units, *unit_shape].
        words: u16[layers, kv_heads, pages, T, width], auxiliary parts u16[layers, kv_heads, pages, ...].
        pages: i32[pages], first units.
    """
    name, options = _resolve(implementation, interpret)
    return _writer(name).write_pages(arena, words, pages, kv_format, geometry, **options)


def requantize(
    arena: jax.Array,
    sources: jax.Array,
    targets: jax.Array,
    count: jax.Array,
    source_format: KVFormat,
    target_format: KVFormat,
    geometry: PageGeometry,
    *,
    implementation: Implementation | None = None,
    interpret: bool | None = None,
) -> jax.Array:
    """Reads full pages in one format and writes what they hold to other pages in another, all layers.

    Args:
        arena: u16[num_units, *unit_shape].
        sources, targets: i32[N], first units. A target must not overlap any source.
        count: i32[], how many of them count.
        source_format, target_format: any two formats.
    """
    name, options = _resolve(implementation, interpret)
    return _writer(name).requantize(arena, sources, targets, count, source_format, target_format, geometry, **options)


def _resolve(implementation: Implementation | None, interpret: bool | None) -> tuple[Implementation, dict[str, bool]]:
    """The implementation, and the keywords that only kernels take."""
    name = default_implementation() if implementation is None else check_implementation(implementation)
    if name == "xla":
        return name, {}
    return name, {"interpret": is_interpreted(name) if interpret is None else interpret}


def _writer(implementation: Implementation) -> ModuleType:
    if implementation == "triton":
        from fineserve_jax.pallas_kernels.triton import write as triton

        return triton
    if implementation == "mosaic_tpu":
        from fineserve_jax.pallas_kernels.mosaic_tpu import write as mosaic

        return mosaic
    return xla
