"""Paged attention on TPUs: one launch for segments of all formats (see `attention_kernel`)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from fineserve_jax.pallas_kernels.formats import KEYS, VALUES, KVFormat
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.mosaic_tpu.attention_kernel import attention_kernel
from fineserve_jax.pallas_kernels.mosaic_tpu.lane_layout import LANES, SUBLANES, TILE_WORDS, PageLayout
from fineserve_jax.pallas_kernels.mosaic_tpu.launch_plan import BUFFERS, ROW_MULTIPLE, Launch, Memory, TileTable
from fineserve_jax.pallas_kernels.pallas_api import (
    BlockSpec,
    TpuDMASemaphore,
    TpuPrefetchScalarGridSpec,
    TpuVMEM,
    pallas_call,
    tpu_in_place,
    tpu_interpret,
    tpu_params,
)
from fineserve_jax.pallas_kernels.rotations import Rotations
from fineserve_jax.pallas_kernels.softmax import NEGATIVE, PartialAttention
from fineserve_jax.pallas_kernels.specs import AttentionSpec
from fineserve_jax.pallas_kernels.tiles import Tiles
from fineserve_jax.pallas_kernels.tiling import TileSizes, Tiling

# One core takes a segment whole.
TILING = Tiling(
    decode=TileSizes(splits=1, queries=1, tokens=1 << 30),
    ragged=TileSizes(splits=1, queries=32, tokens=1 << 30),
)

# Tokens of a step: enough work to hide a step's latencies, and copies long enough to reach the memory's bandwidth.
DECODE_STEP_TOKENS = 128
RAGGED_STEP_TOKENS = 256
MAX_LOGITS = 1 << 16  # of a step and a block of heads
MAX_TABLE_BYTES = 3 << 18  # of scalar memory's 1 MiB
VMEM_LIMIT_BYTES = 100 << 20  # of the 128 MiB that v5e and v6e have


def attend_pages(
    spec: AttentionSpec, q: jax.Array, arena: jax.Array, tiles: Tiles, layer: jax.Array
) -> PartialAttention:
    """Attention of each query to its row's cached tokens: see `Backend.attend`. Tiles are of one segment each.

    Raises:
        ValueError: the arena's units are no TPU tiles, or the page tables are too long for a TPU's scalar memory.
    """
    _check(spec)
    launch = plan_launch(spec, q.shape[2], q.dtype)
    blocks = _to_query_blocks(launch, q, tiles)
    acc, stats = _call(spec, launch, tabulate(spec, launch, tiles), tiles, layer, blocks, arena)
    parts = (stats[..., 0], NEGATIVE), (stats[..., 1], 0.0), (acc, 0.0)
    return PartialAttention(*(_to_queries(spec, launch, tiles, blocks, empty) for blocks, empty in parts))


def _check(spec: AttentionSpec) -> None:
    if spec.geometry.unit_words != TILE_WORDS:
        raise ValueError(
            f"an arena with units of {spec.geometry.unit_words} words cannot be copied on a TPU; make the geometry "
            f"with unit_words={TILE_WORDS}, as choose_unit_words(..., tpu=True) does"
        )
    shape = TILING.shape(spec)
    table_bytes = 4 * shape.max_tiles * shape.pages
    if table_bytes > MAX_TABLE_BYTES:
        raise ValueError(
            f"page tables of {shape.max_tiles} segments of {shape.pages} pages take {table_bytes} bytes; a TPU's "
            f"scalar memory has room for {MAX_TABLE_BYTES}: use longer pages, fewer rows or shorter sequences"
        )


def plan_launch(spec: AttentionSpec, group: int, dtype: jnp.dtype) -> Launch:
    """The sizes of a launch: pages of a step, heads of a head block, rows of queries."""
    geometry, queries = spec.geometry, TILING.shape(spec).queries
    tokens = DECODE_STEP_TOKENS if spec.decodes else RAGGED_STEP_TOKENS
    pages = max(1, min(tokens // geometry.page_size, TILING.shape(spec).pages))
    head_rows = group * queries
    return Launch(
        formats=tuple(_page_layout(geometry, kv_format, pages, head_rows) for kv_format in spec.formats),
        rotations=_rotations(spec),
        tiles_per_query_block=TILING.shape(spec).tiles_per_query_block,
        group=group,
        queries=queries,
        query_rows=_round_up(geometry.kv_heads * head_rows, ROW_MULTIPLE),
        dtype=jnp.dtype(dtype),
        window=spec.window,
        soft_cap=spec.soft_cap,
    )


def _distinct_rotations(spec: AttentionSpec) -> Rotations:
    """Of the keys of every format, then of the values of every format."""
    return Rotations([f.key for f in spec.formats] + [f.value for f in spec.formats], spec.geometry.head_dim)


def _rotations(spec: AttentionSpec) -> tuple[tuple[int | None, int | None], ...]:
    """Of each format the numbers of its rotations, of keys and of values; None: they are kept as they are."""
    numbers, count = _distinct_rotations(spec).of_codec, len(spec.formats)

    def number(kv_format: KVFormat, side: int, place: int) -> int | None:
        rotates = kv_format.sides[side].rotation(spec.geometry.head_dim) is not None
        return numbers[side * count + place] if rotates else None

    return tuple((number(f, KEYS, i), number(f, VALUES, i)) for i, f in enumerate(spec.formats))


def _page_layout(geometry: PageGeometry, kv_format: KVFormat, pages: int, head_rows: int) -> PageLayout:
    """How many heads to take at a time.

    Few steps are fast, but logits of one head's queries with another's keys are waste, and grow with the heads' square.
    """
    best = PageLayout(kv_format, geometry, geometry.kv_heads, pages)
    tokens = pages * geometry.page_size
    for heads in range(geometry.kv_heads - 1, 0, -1):
        if best.heads**2 * head_rows * tokens <= MAX_LOGITS:
            break
        fewer = dataclasses.replace(best, heads=heads)
        if fewer.splits_evenly and heads * head_rows % ROW_MULTIPLE == 0:
            best = fewer
    return best


def tabulate(spec: AttentionSpec, launch: Launch, tiles: Tiles) -> TileTable:
    """What the kernel has to know of each grid step: each query block's tiles, one after the other."""
    page_size, shape = spec.geometry.page_size, TILING.shape(spec)
    blocks = jnp.repeat(jnp.arange(shape.num_query_blocks), launch.tiles_per_query_block)
    tile = tiles.query_block_tiles.reshape(-1)
    used, of = tile < shape.max_tiles, jnp.minimum(tile, shape.max_tiles - 1)
    counts = tiles.query_counts[blocks]
    offsets = tiles.query_positions[blocks] - tiles.positions[of, 0]
    num_tokens = jnp.clip(offsets + counts, 0, jnp.where(used, tiles.num_tokens[of, 0], 0))
    end = -(-num_tokens // page_size)
    first = jnp.zeros_like(end)
    if spec.window is not None:
        first = jnp.clip((offsets - spec.window + 1) // page_size, 0, end)
    table = TileTable(
        format_ids=jnp.where(used, tiles.format_ids[of], len(spec.formats)),
        first_pages=of * shape.pages + first,
        num_pages=end - first,
        tokens_before=first * page_size,
        num_tokens=num_tokens,
        offsets=offsets,
        query_blocks=jnp.where(counts > 0, blocks, 0),
        outputs=jnp.where(counts > 0, blocks, shape.num_query_blocks),
    )
    none = TileTable(len(spec.formats), *[0] * (len(table) - 1))
    both = zip(table, none, strict=True)
    return TileTable(*(jnp.pad(part.astype(jnp.int32), (0, 1), constant_values=end) for part, end in both))


def _to_query_blocks(launch: Launch, q: jax.Array, tiles: Tiles) -> jax.Array:
    """[num_queries, kv_heads, group, D] -> [num_query_blocks, query_rows, D], rows of (kv head, group, query)."""
    queries = jnp.minimum(tiles.query_starts[:, None] + jnp.arange(launch.queries), len(q) - 1)
    blocks = jnp.moveaxis(q[queries], 1, 3)
    rows = blocks.reshape(len(blocks), -1, q.shape[-1])
    return jnp.pad(rows, ((0, 0), (0, launch.query_rows - rows.shape[1]), (0, 0)))


def _to_queries(spec: AttentionSpec, launch: Launch, tiles: Tiles, blocks: jax.Array, empty: float) -> jax.Array:
    """[num_query_blocks + 1, query_rows, ...] -> [num_queries, kv_heads, group, ...], `empty` without a query."""
    kv_heads, group, queries, rest = spec.geometry.kv_heads, launch.group, launch.queries, blocks.shape[2:]
    rows = blocks[:, : kv_heads * group * queries].reshape(-1, kv_heads, group, queries, *rest)
    rows = jnp.moveaxis(rows, 3, 1).reshape(-1, kv_heads, group, *rest)
    known = (tiles.query_block < TILING.shape(spec).num_query_blocks).reshape(-1, *[1] * (rows.ndim - 1))
    return jnp.where(known, rows[tiles.query_block * queries + tiles.index_in_query_block], empty)


def _call(
    spec: AttentionSpec,
    launch: Launch,
    table: TileTable,
    tiles: Tiles,
    layer: jax.Array,
    q: jax.Array,
    arena: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """acc and stats of each query block, see `Outputs`; one more holds anything."""
    head_dim, num_rows = spec.geometry.head_dim, launch.query_rows
    fields, num_query_blocks = len(table), TILING.shape(spec).num_query_blocks
    rotations = _distinct_rotations(spec).rotate(jnp.eye(head_dim, dtype=jnp.float32))

    def body(*refs: Any) -> None:
        attention_kernel(launch, TileTable(*refs[:fields]), *refs[fields:])

    def query_block(tile: Any, *scalars: Any) -> tuple[Any, ...]:
        return TileTable(*scalars[:fields]).query_blocks[tile], 0, 0

    def output_block(tile: Any, *scalars: Any) -> tuple[Any, ...]:
        return TileTable(*scalars[:fields]).outputs[tile], 0, 0

    scalars = (*table, tiles.pages.reshape(-1), layer.reshape(1))
    outputs = (1, num_rows, head_dim), (1, num_rows, LANES)
    launched = pallas_call(
        body,
        grid_spec=TpuPrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(num_query_blocks * launch.tiles_per_query_block,),
            in_specs=[
                BlockSpec((1, num_rows, head_dim), query_block),
                BlockSpec(rotations.shape, lambda *_: (0, 0, 0)),
                tpu_in_place(),
            ],
            out_specs=[BlockSpec(shape, output_block) for shape in outputs],
            scratch_shapes=_memory(launch),
        ),
        out_shape=[jax.ShapeDtypeStruct((num_query_blocks + 1, *shape[1:]), jnp.float32) for shape in outputs],
        compiler_params=tpu_params(("arbitrary",), VMEM_LIMIT_BYTES),
        interpret=tpu_interpret(bool(spec.interpret)),
        name="attend_pages",
    )
    acc, stats = launched(*scalars, q, rotations, arena)
    return acc, stats


def _memory(launch: Launch) -> Memory:
    return Memory(
        pages=TpuVMEM((BUFFERS, launch.pages, launch.page_tiles, SUBLANES, LANES), jnp.uint16),
        semaphores=TpuDMASemaphore((BUFFERS,)),
        spare=TpuVMEM((launch.spare_rows, LANES), jnp.int32),
        arranged=TpuVMEM((launch.arranged_rows, LANES), launch.dtype),
        m=TpuVMEM((launch.query_rows, LANES), jnp.float32),
        l=TpuVMEM((launch.query_rows, LANES), jnp.float32),
        acc=TpuVMEM((launch.max_packed_lanes, launch.query_rows, LANES), jnp.float32),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
