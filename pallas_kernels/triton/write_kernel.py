"""Writing the arena in Triton: new tokens and whole pages. Pages that change format: see `requantize_kernel`.

Every array of new words is rows: one a token (its vector, or one of its scales) or one a page (what covers the whole
page), for each layer and head. A program copies a block of a layer's rows of one page. Sizes that are no power of two
are cut into some that are, so that nothing needs a mask and stores are as wide as they can be.
"""

import functools
import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from fineserve_jax.pallas_kernels.formats import Granularity, KVFormat, PageWords
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.pallas_api import pallas_call, program_id, triton_params, when
from fineserve_jax.pallas_kernels.pallas_api import triton_load as load
from fineserve_jax.pallas_kernels.specs import WriteSpec
from fineserve_jax.pallas_kernels.triton.addressing import at, clear_padding, powers_of_two, store_words

BLOCK_WORDS = 2048  # of one array, that a program copies
WARP_WORDS = 256  # 8 words, 128 bits, a thread

Ref = Any


def write_tokens(
    spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array, offsets: jax.Array
) -> jax.Array:
    """Writes one token into each of N pages: see `Backend.write_tokens`."""
    return _write(spec, kv_format, arena, words, pages, offsets, whole_pages=False)


def write_pages(
    spec: WriteSpec, kv_format: KVFormat, arena: jax.Array, words: PageWords, pages: jax.Array
) -> jax.Array:
    """Writes whole pages, all layers: see `Backend.write_pages`."""
    return _write(spec, kv_format, arena, words, pages, jnp.zeros_like(pages), whole_pages=True)


@dataclass(frozen=True)
class _Part:
    """One array of new words, and where it goes in a page's layer.

    Attributes:
        width: words of a row.
        start: where the first row goes, counted in words from the beginning of the layer.
        stride: words from where one row goes to where the next does.
        tokens: rows of a head among the new words.
        places: rows of a head in the page.
        at_once: rows of a block.
        blocks: blocks of a page's layer.
    """

    width: int
    start: int
    stride: int
    tokens: int
    places: int
    at_once: int
    blocks: int


def _parts(kv_format: KVFormat, geometry: PageGeometry, tokens: int) -> list[_Part]:
    """The parts of `PageWords`, as `_arrays` lists them. `tokens`: how many of each page there are."""

    def part(width: int, start: int, stride: int, per_token: bool) -> _Part:
        own, places = (tokens, geometry.page_size) if per_token else (1, 1)
        rows = geometry.kv_heads * own
        at_once = math.gcd(rows, max(1, BLOCK_WORDS // (1 << (width - 1).bit_length())))
        return _Part(width, start, stride, own, places, at_once, rows // at_once)

    parts = []
    for codec, start in zip(kv_format.sides, kv_format.block_starts(geometry), strict=True):
        width = codec.width(geometry)
        stride = codec.vector_words(geometry)
        parts += [part(width, start + i * width, stride, True) for i in range(codec.word_parts)]
    starts = kv_format.scale_starts(geometry)
    for side, i in kv_format.scale_order():
        kind, size = kv_format.sides[side].scales[i], kv_format.sides[side].scale_sizes(geometry)[i]
        row = 1 if kind is Granularity.TOKEN else size
        parts.append(part(row, starts[side][i], row, kind is Granularity.TOKEN))
    return parts


def _arrays(kv_format: KVFormat, words: PageWords) -> list[jax.Array]:
    """The word parts of keys and of values, then the scale arrays in the order in which they lie in the page."""
    scales = [words[side].scales[i] for side, i in kv_format.scale_order()]
    return [*words.k.words, *words.v.words, *scales]


def _write(
    spec: WriteSpec,
    kv_format: KVFormat,
    arena: jax.Array,
    words: PageWords,
    pages: jax.Array,
    offsets: jax.Array,
    *,
    whole_pages: bool,
) -> jax.Array:
    geometry = spec.geometry
    layers, _, count, tokens, _ = words.k.words[0].shape
    parts = _parts(kv_format, geometry, tokens)
    arrays = _arrays(kv_format, words)
    rows = [array.reshape(-1, part.width) for array, part in zip(arrays, parts, strict=True)]
    units = arena.reshape(len(arena), -1)
    warps = max(part.at_once * part.width for part in parts) // WARP_WORDS
    launch = pallas_call(
        functools.partial(_kernel, parts=parts, kv_format=kv_format, geometry=geometry, whole_pages=whole_pages),
        grid=(count, layers, max(part.blocks for part in parts)),
        out_shape=jax.ShapeDtypeStruct(units.shape, units.dtype),
        input_output_aliases={2 + len(rows): 0},
        compiler_params=triton_params(num_warps=1 << max(0, min(warps, 4).bit_length() - 1), num_stages=1),
        interpret=bool(spec.interpret),
        name="write_pages" if whole_pages else "write_tokens",
    )
    return launch(pages, offsets, rows, units).reshape(arena.shape)


def _kernel(
    pages: Ref,
    offsets: Ref,
    words: list[Ref],
    _arena_before: Ref,
    arena: Ref,
    *,
    parts: list[_Part],
    kv_format: KVFormat,
    geometry: PageGeometry,
    whole_pages: bool,
) -> None:
    item, layer, block = program_id(0), program_id(1), program_id(2)
    page, items = load(pages.at[item]), pages.shape[0]

    @when(page < arena.shape[0])
    def _() -> None:
        first_unit = page + layer * kv_format.units_per_layer(geometry)
        destination = first_unit, load(offsets.at[item])
        for part, source in zip(parts, words, strict=True):
            origin = (layer * geometry.kv_heads * items + item) * part.tokens, items * part.tokens
            when(block < part.blocks)(functools.partial(_copy_block, part, source, arena, block, destination, origin))
        if whole_pages:
            when(block == 0)(functools.partial(clear_padding, arena, first_unit, kv_format, geometry))


def _copy_block(
    part: _Part,
    source: Ref,
    arena: Ref,
    block: jax.Array,
    destination: tuple[jax.Array, jax.Array],
    origin: tuple[jax.Array, int],
) -> None:
    """Copies one block of the rows of a page's layer.

    Args:
        destination: the layer's first unit, and where in the page a head's first row goes.
        origin: of the rows in `source`, the first head's first, and how far it is from one head's to the next's.
    """
    row = block * part.at_once + lax.broadcasted_iota(jnp.int32, (part.at_once, 1), 0)
    head, token = lax.div(row, part.tokens), lax.rem(row, part.tokens)
    source_row = origin[0] + head * origin[1] + token
    place = head * part.places + token
    if part.places > 1:
        place = place + destination[1]
    for start, length in powers_of_two(part.width):
        column = start + lax.broadcasted_iota(jnp.int32, (1, length), 1)
        values = load(at(source, source_row, column))
        store_words(arena, destination[0], part.start + place * part.stride + column, values)
