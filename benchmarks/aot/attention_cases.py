"""Attention: decoding and ragged batches, every KV format alone and all in one launch."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.aot.batches import AttentionBatch
from benchmarks.aot.cases import (
    ARENA_WORDS,
    GEMMA,
    IMPLEMENTATION,
    LLAMA_8B,
    MODELS,
    ODD_MODELS,
    Case,
    Model,
    arena_shape,
    models_of_single_formats,
    shapes_of,
    without_scales,
)
from benchmarks.aot.targets import Platform
from fineserve_jax.pallas_kernels import FORMATS, AttentionSpec, KVFormat
from fineserve_jax.pallas_kernels.operations import paged_attention, plan_attention

ROWS, CONTEXT, CHUNK_TOKENS = 64, 8192, 512
EVERY_FORMAT = tuple(FORMATS.values())
# Their queries in f32 too, as for models whose weights are: a GPU's registers hold less of them.
EXACT_MODELS = LLAMA_8B, GEMMA


def attention_cases(platform: Platform, full: bool) -> Iterator[Case]:
    for operation in ("decode", "ragged"):
        # Ragged batches take longest to compile.
        for model in models_of_single_formats(full) if full or operation == "decode" else (LLAMA_8B,):
            for name, kv_format in FORMATS.items():
                yield attention_case(platform, operation, model, name, (kv_format,))
        for model in (*MODELS, *ODD_MODELS):
            yield attention_case(platform, operation, model, "all mixed", EVERY_FORMAT)
        for model in EXACT_MODELS if platform == "gpu" else ():
            yield attention_case(platform, operation, model, "all mixed", EVERY_FORMAT, jnp.float32)


def attention_case(
    platform: Platform,
    operation: str,
    model: Model,
    name: str,
    formats: tuple[KVFormat, ...],
    dtype: Any = jnp.bfloat16,
) -> Case:
    """Attention of `ROWS` decoding rows, or of a chunk of tokens of several rows; `dtype` is that of the queries."""
    case = _case(platform, operation, model, name, formats, dtype)
    if platform == "tpu" or not any(codec.scales for kv_format in formats for codec in kv_format.sides):
        return case
    bare = _case(platform, operation, model, name, tuple(map(without_scales, formats)), dtype)
    return dataclasses.replace(case, without_scales=bare)


def _case(
    platform: Platform, operation: str, model: Model, name: str, formats: tuple[KVFormat, ...], dtype: Any
) -> Case:
    geometry = model.geometry(platform)
    decodes = operation == "decode"
    spec = AttentionSpec(
        geometry,
        formats,
        num_rows=ROWS if decodes else CHUNK_TOKENS // geometry.page_size,
        max_pages=CONTEXT // geometry.page_size,
        num_queries=None if decodes else CHUNK_TOKENS,
        segments_per_row=2 if any(kv_format.residual for kv_format in formats) else 1,
        window=model.window,
        soft_cap=model.soft_cap,
        implementation=IMPLEMENTATION[platform],
        interpret=False,
    )
    q = jax.ShapeDtypeStruct((spec.query_axis_size, model.heads, model.head_dim), dtype)
    layer = jax.ShapeDtypeStruct((), jnp.int32)
    return Case(
        operation if dtype == jnp.bfloat16 else f"{operation} in f32",
        model.name,
        name,
        functools.partial(paged_attention, spec),
        (q, arena_shape(geometry), shapes_of(plan_attention(spec, [], [])), layer),
        ARENA_WORDS,
        model.head_dim,
        reads_pages=True,
        batch=AttentionBatch(spec, model.heads, dtype),
        # Chunks of many queries are taken in blocks of rows, each of which reads the pages, from the L2 cache mostly.
        strict_bytes=decodes,
    )
