"""One whole step of an engine, stage by stage, of a small and of a large model; parameters are shapes only."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.aot.cases import (
    ARENA_WORDS,
    IMPLEMENTATION,
    LLAMA_8B,
    SMOLLM,
    Case,
    Model,
    arena_shape,
    shapes_of,
)
from benchmarks.aot.targets import Platform
from fineserve_jax.models import ModelConfig, abstract_params, build_model
from fineserve_jax.request.request import SchedulerOutput
from fineserve_jax.runner import step
from fineserve_jax.runner.inputs import build_inputs
from fineserve_jax.runner.sampling_inputs import build_sampling
from fineserve_jax.runner.shapes import StepShape, StepSpec

FORMATS = ("bf16", "int8", "int4")
ROWS, CHUNK_TOKENS, CONTEXT, WEIGHTS = 32, 256, 4096, "bf16"
CONFIGS = {
    SMOLLM: ModelConfig(
        family="llama",
        vocab_size=49152,
        hidden_size=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        intermediate_size=1536,
        tie_embeddings=True,
        max_position=8192,
    ),
    LLAMA_8B: ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=4096,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=14336,
        rope_theta=500000.0,
        max_position=131072,
    ),
}


def step_cases(platform: Platform) -> Iterator[Case]:
    """The stages of a step that decodes and prefills, with three formats in it."""
    for model, config in CONFIGS.items():
        yield from _stages(platform, model, config)


def _stages(platform: Platform, model: Model, config: ModelConfig) -> Iterator[Case]:
    geometry = model.geometry(platform)
    spec = StepSpec(
        build_model(config, WEIGHTS),
        geometry,
        FORMATS,
        StepShape(ROWS, CHUNK_TOKENS),
        CONTEXT // geometry.page_size,
        implementation=IMPLEMENTATION[platform],
        interpret=False,
    )
    params = abstract_params(config, WEIGHTS)
    host_inputs, _ = build_inputs(spec, SchedulerOutput((), ()), None)  # an empty plan asks nothing
    inputs, sampling = shapes_of((host_inputs, build_sampling([], ROWS, CONTEXT)))
    arena, number = arena_shape(geometry), jax.ShapeDtypeStruct((), jnp.int32)
    stream = jax.eval_shape(functools.partial(step.embed, spec), params, inputs)
    of_layer = (params["layers_0"], stream, number, arena, inputs)
    one_layer = functools.partial(step.layer, spec, 0, True)  # of the only group, with RoPE
    _, words = jax.eval_shape(one_layer, *of_layer)

    def stage(name: str, program: Any, *arguments: Any, donate: tuple[int, ...] = ()) -> Case:
        return Case(
            f"step: {name}",
            model.name,
            "+".join(FORMATS),
            program,
            arguments,
            ARENA_WORDS,
            model.head_dim,
            donate=donate,
        )

    yield stage("embed", functools.partial(step.embed, spec), params, inputs)
    yield stage("layer", one_layer, *of_layer)
    yield stage("head", functools.partial(step.head, spec), params, stream, inputs, sampling)
    commit = functools.partial(step.commit, spec)
    yield stage("commit", commit, arena, [words] * config.num_layers, inputs, donate=(0,))
