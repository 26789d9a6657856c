"""Every operation of the kernels against an oracle, on the device at hand."""

import dataclasses
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from fineserve_jax.pallas_kernels import (
    FORMATS,
    AttentionSpec,
    BatchSegment,
    KVFormat,
    PageGeometry,
    QueryRun,
    Tiles,
    WriteSpec,
    choose_unit_words,
    get_format,
    new_arena,
    paged_attention,
    plan_attention,
    requantize,
    write_pages,
    write_tokens,
)
from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.implementation import Implementation
from fineserve_jax.pallas_kernels.xla.page_gather import gather_page_layers

WORD_BYTES = 2
PAGES_AT_A_TIME = 256
# Norm of the difference over the norm: of products in f32, and of bf16 operands.
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}


@dataclasses.dataclass(frozen=True)
class Batch:
    """A cache of random tokens, and queries for it.

    Attributes:
        num_bytes: what the rows' pages hold, padding not counted.
    """

    spec: AttentionSpec
    arena: jax.Array
    q: jax.Array
    tiles: Tiles
    segments: list[BatchSegment]
    queries: list[QueryRun]
    num_bytes: int


def make_batch(
    geometry: PageGeometry,
    formats: tuple[KVFormat, ...],
    tokens: Sequence[int],
    heads: int,
    implementation: Implementation,
    queries: Sequence[int] | None = None,
    **options,
) -> Batch:
    """Caches `tokens[row]` random tokens for each row, whose format is dealt out in turn.

    A row in a page-wise format keeps the tokens of its last page in the format's residual, if they do not fill it.

    Args:
        queries: new tokens of each row, at the positions that follow its cached ones; None: one each (decoding).
        options: of the `AttentionSpec`.
    """
    residuals = {get_format(kv_format.residual) for kv_format in formats if kv_format.residual is not None}
    program = tuple(dict.fromkeys([*formats, *residuals]))
    plan: dict[KVFormat, list[int]] = {kv_format: [] for kv_format in program}
    segments, next_unit, size = [], max(f.page_units(geometry) for f in program), geometry.page_size
    for row, num_tokens in enumerate(tokens):
        kv_format = formats[row % len(formats)]
        whole = num_tokens if kv_format.residual is None else num_tokens // size * size
        parts = [(kv_format, 0, whole)]
        if whole < num_tokens:
            parts.append((get_format(kv_format.residual), whole, num_tokens - whole))
        for part, first, count in parts:
            pages = [next_unit + i * part.page_units(geometry) for i in range(-(-count // size))]
            next_unit += len(pages) * part.page_units(geometry)
            plan[part] += pages
            segments.append(BatchSegment(row, program.index(part), pages, count, first))
    arena = fill(new_arena(geometry, next_unit), geometry, plan)
    runs, slot = [], 0
    for row, count in enumerate(queries or [1] * len(tokens)):
        runs.append(QueryRun(slot, count, tokens[row]))
        slot += count
    spec = AttentionSpec(
        geometry,
        program,
        num_rows=len(tokens),
        max_pages=max(1, -(-max(tokens) // size)),
        num_queries=None if queries is None else slot,
        segments_per_row=2,
        implementation=implementation,
        **options,
    )
    q = np.random.default_rng(1).standard_normal((slot, heads, geometry.head_dim), np.float32)
    q = jnp.asarray(q / geometry.head_dim**0.5)
    words = sum(len(segment.pages) * program[segment.format_id].words_per_layer(geometry) for segment in segments)
    return Batch(spec, arena, q, plan_attention(spec, segments, runs), segments, runs, words * WORD_BYTES)


def fill(arena: jax.Array, geometry: PageGeometry, plan: dict[KVFormat, list[int]]) -> jax.Array:
    """Writes random pages of each format, by XLA."""
    write = jax.jit(_write_vectors, static_argnums=0, donate_argnums=1)
    shape = (geometry.num_layers, geometry.kv_heads, PAGES_AT_A_TIME, geometry.page_size, geometry.head_dim)
    for seed, (kv_format, pages) in enumerate(plan.items()):
        for i in range(0, len(pages), PAGES_AT_A_TIME):
            own = np.full(PAGES_AT_A_TIME, NOWHERE, np.int32)
            own[: len(pages[i : i + PAGES_AT_A_TIME])] = pages[i : i + PAGES_AT_A_TIME]
            k, v = (jax.random.normal(key, shape) for key in jax.random.split(jax.random.key(seed * 65536 + i)))
            ids = jnp.zeros(PAGES_AT_A_TIME, jnp.int32)
            arena = write(WriteSpec(geometry, (kv_format,), "xla"), arena, k, v, own, ids)
    return arena


def _write_vectors(
    spec: WriteSpec, arena: jax.Array, k: jax.Array, v: jax.Array, pages: jax.Array, format_ids: jax.Array
) -> jax.Array:
    return write_pages(spec, arena, spec.encode_pages(k, v), pages, format_ids)


def check_operations(
    implementation: Implementation, console: Console, head_dims: Sequence[int] = (64, 128)
) -> dict[str, float]:
    """Runs every operation in small; exits if one is wrong. Returns the errors."""
    errors: dict[str, float] = {}
    for head_dim, dtype in itertools.product(head_dims, (jnp.float32, jnp.bfloat16)):
        geometry = _geometry(head_dim, implementation)
        formats, name = tuple(FORMATS.values()), f"head_dim {head_dim}, {jnp.dtype(dtype).name}"
        lengths = [0, 1, 15, 16, 17, 100, 700, 33, 64, 200][: 2 * len(formats)]
        for kind, queries in (("decode", None), ("ragged", [1, 40, 1, 70, 1, 1, 16, 1, 1, 3])):
            batch = make_batch(geometry, formats, lengths, 8, implementation, queries)
            errors[f"{kind}, {name}"] = attention_error(batch, dtype)
    for head_dim in head_dims:
        errors[f"writes that differ, head_dim {head_dim}"] = write_differences(
            _geometry(head_dim, implementation), implementation
        )
    table = Table("operation", "relative error", "limit")
    wrong = []
    for name, error in errors.items():
        limit = LIMITS.get(name.rsplit(" ", 1)[-1], 1e-3)
        wrong += [name] if not error <= limit else []
        table.add_row(name, f"{error:.2e}", f"{limit:.0e}")
    console.print(table)
    if wrong:
        raise SystemExit(f"wrong results on this device: {', '.join(wrong)}")
    return errors


def _geometry(head_dim: int, implementation: Implementation) -> PageGeometry:
    unit_words = choose_unit_words(head_dim, 16, tpu=get_backend(implementation).tile_units)
    return PageGeometry(1, 2, head_dim, 16, unit_words)


def attention_error(batch: Batch, dtype: jnp.dtype) -> float:
    """Norm of the difference from float64 attention, over the norm of that."""
    seen = jax.jit(paged_attention, static_argnums=0)(batch.spec, batch.q.astype(dtype), batch.arena, batch.tiles, 0)
    result, expected = (
        np.asarray(seen.output(), np.float64),
        oracle(batch, np.asarray(batch.q.astype(dtype), np.float64)),
    )
    return float(np.linalg.norm(result - expected) / np.linalg.norm(expected))


def oracle(batch: Batch, q: np.ndarray) -> np.ndarray:
    """Textbook attention in float64 over what the cached words stand for, f64[num_queries, heads, head_dim]."""
    geometry, output = batch.spec.geometry, np.zeros(q.shape)
    for row, run in enumerate(batch.queries):
        own = [_read(batch, segment) for segment in batch.segments if segment.row == row and segment.num_tokens]
        if not own:
            continue
        k, v = (np.concatenate(part, axis=1) for part in zip(*own, strict=True))
        mine = slice(run.start, run.start + run.num_queries)
        grouped = q[mine].reshape(run.num_queries, geometry.kv_heads, -1, geometry.head_dim)
        logits = np.einsum("qhgd,htd->qhgt", grouped, k)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        output[mine] = np.einsum("qhgt,htd->qhgd", weights, v).reshape(output[mine].shape)
    return output


def _read(batch: Batch, segment: BatchSegment) -> list[np.ndarray]:
    """A segment's keys and values, f64[kv_heads, tokens, head_dim]."""
    geometry, kv_format = batch.spec.geometry, batch.spec.formats[segment.format_id]
    words = gather_page_layers(batch.arena, jnp.asarray(segment.pages, jnp.int32), 0, kv_format, geometry)
    shape = (geometry.kv_heads, -1, geometry.head_dim)
    return [np.asarray(x, np.float64).reshape(shape)[:, : segment.num_tokens] for x in kv_format.decode_vectors(words)]


def write_differences(geometry: PageGeometry, implementation: Implementation) -> float:
    """The share of an arena's words that differ from XLA's, after writes and requantizations of all formats."""
    arenas = [np.asarray(_write_everything(geometry, name)) for name in (implementation, "xla")]
    return float((arenas[0] != arenas[1]).mean())


def _write_everything(geometry: PageGeometry, implementation: Implementation) -> jax.Array:
    token_wise = tuple(kv_format for kv_format in FORMATS.values() if kv_format.residual is None)
    stride, every = FORMATS["fp32"].page_units(geometry), tuple(FORMATS.values())
    num_pages = 4 * len(every)
    k, v = (
        jax.random.normal(key, (1, 2, num_pages, geometry.page_size, geometry.head_dim))
        for key in jax.random.split(jax.random.key(5))
    )
    pages = jnp.arange(1, num_pages + 1, dtype=jnp.int32) * stride
    ids = jnp.arange(num_pages, dtype=jnp.int32)
    arena = new_arena(geometry, (2 * num_pages + 1) * stride)
    spec = WriteSpec(geometry, every, implementation)
    arena = write_pages(spec, arena, spec.encode_pages(k, v), pages, ids % len(every))
    wide = jnp.where(ids % len(every) < len(token_wise), pages, NOWHERE)
    tokens = WriteSpec(geometry, token_wise, implementation)
    words = tokens.encode_tokens(k[:, :, ::-1, 3], v[:, :, ::-1, 3])
    arena = write_tokens(tokens, arena, words, wide, ids % geometry.page_size, ids % len(every))
    for i, target in enumerate(every):
        source = jnp.array([2, 2 + len(every)], jnp.int32) * stride  # bf16 pages
        own = (num_pages + 1 + 2 * i + jnp.arange(2, dtype=jnp.int32)) * stride
        arena = requantize(spec, FORMATS["bf16"], target, arena, source, own, jnp.int32(2))
    return arena
