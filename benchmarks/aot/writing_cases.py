"""Writing the arena: new tokens, whole pages, and pages that change format."""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from benchmarks.aot.cases import (
    ARENA_WORDS,
    GEMMA,
    IMPLEMENTATION,
    LLAMA_8B,
    PHI,
    QWEN_32B,
    Case,
    Model,
    arena_shape,
    models_of_single_formats,
    without_scales,
)
from benchmarks.aot.targets import Platform
from benchmarks.aot.writing_batches import RequantizeBatch, WriteBatch, encode_and_write_pages, encode_and_write_tokens
from fineserve_jax.pallas_kernels import FORMATS, KVFormat, PageGeometry, WriteSpec, get_format, requantize

# int4 takes a head's page at once: 128 tokens of 128 channels fit in a GPU program's registers, or 32 of 256.
LONG_PAGES = dataclasses.replace(LLAMA_8B, name="Llama-3.1-8B, T = 128", page_sizes=(("gpu", 128), ("tpu", 128)))
LONG_VECTORS = dataclasses.replace(GEMMA, name="Gemma-2-9B, T = 32", page_sizes=(("gpu", 32), ("tpu", 32)))
ROWS, PAGES = 8, 2  # compilers take longer for more, and say the same
# Every format once, to a narrower one.
SOME_CHANGES = (("fp32", "bf16"), ("fp16", "fp8"), ("bf16", "int8"), ("bf16", "int4"), ("int8", "int4"))


def writing_cases(platform: Platform, full: bool) -> Iterator[Case]:
    """Writes are programs of one kernel for each format: all formats in one program are compiled for one model."""
    token_formats = tuple(kv_format for kv_format in FORMATS.values() if kv_format.residual is None)
    for model in models_of_single_formats(full):
        for kv_format in token_formats:
            yield _write_case(platform, model, kv_format.name, (kv_format,), "write tokens")
        for kv_format in FORMATS.values():
            yield _write_case(platform, model, kv_format.name, (kv_format,), "write pages")
    yield _write_case(platform, QWEN_32B, "all mixed", token_formats, "write tokens")
    yield _write_case(platform, QWEN_32B, "int4", (get_format("int4"),), "write pages")
    every = tuple((a.name, b.name) for a in FORMATS.values() for b in FORMATS.values() if a.value_bits > b.value_bits)
    for model in models_of_single_formats(full):
        for source, target in every if full else SOME_CHANGES:
            yield _requantize_case(platform, model, get_format(source), get_format(target))
    for model in (QWEN_32B, PHI, LONG_VECTORS, LONG_PAGES):
        for source in ("bf16", "int8"):  # narrowing, and closing the page of the newest tokens
            yield _requantize_case(platform, model, get_format(source), get_format("int4"))


def _i32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.int32)


def _write_case(platform: Platform, model: Model, name: str, formats: tuple[KVFormat, ...], operation: str) -> Case:
    geometry = model.geometry(platform)
    spec = _write_spec(platform, geometry, formats)
    layers = (geometry.num_layers, geometry.kv_heads)
    if operation == "write tokens":
        vectors = jax.ShapeDtypeStruct((*layers, ROWS, geometry.head_dim), jnp.bfloat16)
        function, indices = functools.partial(encode_and_write_tokens, spec), [_i32(ROWS)] * 3
    else:
        vectors = jax.ShapeDtypeStruct((*layers, PAGES, geometry.page_size, geometry.head_dim), jnp.bfloat16)
        function, indices = functools.partial(encode_and_write_pages, spec), [_i32(PAGES)] * 2
    arguments = (arena_shape(geometry), vectors, vectors, *indices)
    return Case(
        operation,
        model.name,
        name,
        function,
        arguments,
        ARENA_WORDS,
        model.head_dim,
        donate=(0,),
        batch=WriteBatch(IMPLEMENTATION[platform], formats, geometry, whole_pages=operation == "write pages"),
        # A TPU writes whole tiles: to change one token's words it has to copy the others of the tile too.
        strict_bytes=platform == "gpu" or operation == "write pages",
    )


def _requantize_case(platform: Platform, model: Model, source: KVFormat, target: KVFormat) -> Case:
    geometry = model.geometry(platform)

    def case(source: KVFormat) -> Case:
        spec = _write_spec(platform, geometry, (source, target))
        return Case(
            "requantize",
            model.name,
            f"{source.name} → {target.name}",
            functools.partial(requantize, spec, source, target),
            (arena_shape(geometry), _i32(PAGES), _i32(PAGES), _i32()),
            ARENA_WORDS,
            model.head_dim,
            donate=(0,),
            reads_pages=True,
            batch=RequantizeBatch(IMPLEMENTATION[platform], source, target, geometry),
        )

    bare = case(without_scales(source)) if platform == "gpu" and source.key.scales else None
    return dataclasses.replace(case(source), without_scales=bare)


def _write_spec(platform: Platform, geometry: PageGeometry, formats: tuple[KVFormat, ...]) -> WriteSpec:
    return WriteSpec(geometry, formats, IMPLEMENTATION[platform], interpret=False)
