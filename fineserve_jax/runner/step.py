"""A step as pure functions: embed, layer by layer, head, commit.

    tokens --embed--> x --layer 0..L-1--> x, encoded K and V of each layer --head--> next tokens
                                          arena --commit(encoded K and V)--> arena

`layer` is one program for all layers of a group, since the layer's number is data: a model of any depth compiles in the
time of one layer, or of two where some layers have a window, and the calls are queued ahead of the device. `commit` is
a program of its own, because XLA copies a donated array that is read and written in one program unless it can prove the
order; the arena is far too large for that.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from fineserve_jax.models import block_of
from fineserve_jax.models.rope import RopeTables
from fineserve_jax.pallas_kernels.formats import PageWords
from fineserve_jax.pallas_kernels.operations import requantize, write_pages, write_tokens
from fineserve_jax.request.logits_processor import LogitsProcessor
from fineserve_jax.runner.inputs import StepInputs
from fineserve_jax.runner.layer_attention import LayerAttention, LayerWords
from fineserve_jax.runner.logits_processing import Processing, process
from fineserve_jax.runner.sampler import Sampled, sample
from fineserve_jax.runner.sampling_inputs import SamplingInputs
from fineserve_jax.runner.scoring import Scores, ScoreTile, score_logits
from fineserve_jax.runner.shapes import StepSpec

Params = dict[str, Any]


class Stream(NamedTuple):
    """What flows from layer to layer: the residual f32[N, hidden], and for each of the model's layer groups the
    rotations of the N positions."""

    x: jax.Array
    ropes: tuple[RopeTables, ...]


def take_tokens(spec: StepSpec, tokens: jax.Array, sampled: jax.Array, sources: jax.Array) -> jax.Array:
    """i32[rows], the decode rows' tokens where the host has not got them: row r's is `sampled[sources[r]]` of the step
    before, or `tokens[r]` where `sources[r]` is -1."""
    return jnp.where(sources < 0, tokens, sampled[sources])


def embed(spec: StepSpec, params: Params, inputs: StepInputs) -> Stream:
    """The step's tokens, decode rows first and then chunk slots, as the first layer's input."""
    tokens, positions = inputs.decode.tokens, inputs.decode.positions
    if inputs.chunk is not None:
        tokens = jnp.concatenate([tokens, inputs.chunk.tokens])
        positions = jnp.concatenate([positions, inputs.chunk.positions])
    x, ropes = _apply(spec.model, params, tokens, positions, inputs.long, method="embed_tokens")
    return Stream(_blank(spec, x, tokens), ropes)


def layer(
    spec: StepSpec,
    group: int,
    has_rope: bool,
    params: Params,
    stream: Stream,
    index: jax.Array,
    arena: jax.Array,
    inputs: StepInputs,
    branches: jax.Array | None = None,
) -> tuple[Stream, LayerWords]:
    """One layer. `group`: number of its group, and `has_rope`, static; `params`: of that layer alone; `index`: i32[],
    its number in the group; `branches`: see `branch_numbers`."""
    attention = LayerAttention(spec, group, index, arena, inputs, branches)
    rope = stream.ropes[spec.rope_number(group)] if has_rope else None
    x = _apply(block_of(spec.model, params), params, stream.x, rope, attention)
    return stream._replace(x=x), attention.words


def finite_slots(spec: StepSpec, stream: Stream) -> jax.Array:
    """bool[N], whether what a stage gave for each token is finite.

    What is not stays so in all layers that follow, since each adds to the residual stream, and a token sees itself: so
    the last layer's output tells of all of them, and of the token's keys and values.
    """
    return jnp.isfinite(stream.x).all(axis=-1)


def head(
    spec: StepSpec,
    params: Params,
    stream: Stream,
    inputs: StepInputs,
    sampling: SamplingInputs,
    allowed: jax.Array | None = None,
) -> tuple[Sampled, jax.Array]:
    """The sampled tokens, and `finite_slots` of the last layer. `allowed`: see `sample`."""
    last = _blank(spec, stream.x[inputs.sample_slots], inputs.sample_slots)
    logits = _apply(spec.model, params, last, method="head")
    return sample(logits, sampling, allowed), finite_slots(spec, stream)


def processed_head(
    spec: StepSpec,
    processors: tuple[LogitsProcessor, ...],
    params: Params,
    stream: Stream,
    inputs: StepInputs,
    sampling: SamplingInputs,
    allowed: jax.Array | None,
    tables: tuple[Any, ...],
    processing: Processing,
) -> tuple[tuple[Sampled, jax.Array], tuple[Any, ...]]:
    """What `head` gives where rows name logits processors, and these processors' tables of states. Donate them."""
    logits = _apply(spec.model, params, stream.x[inputs.sample_slots], method="head")
    processed, tables = process(processors, logits, tables, processing)
    return (sample(logits, sampling, allowed, processed), finite_slots(spec, stream)), tables


def score(spec: StepSpec, params: Params, stream: Stream, tile: ScoreTile) -> Scores:
    """The scores of some tokens whose predecessors are in the step."""
    logits = _apply(spec.model, params, stream.x[tile.slots], method="head")
    return score_logits(logits, tile.targets, tile.any_top)


def hidden(spec: StepSpec, stream: Stream, slots: jax.Array) -> jax.Array:
    """f32[T, hidden], what the last layer gave for `slots` i32[T]."""
    return stream.x[slots]


def pool(spec: StepSpec, params: Params, stream: Stream, owners: jax.Array) -> jax.Array:
    """f32[rows + chunk_pages, hidden], sums of last hidden states over slots: i-th of those with i in `owners` i32[N].
    A slot whose owner is beyond the last is in no sum."""
    hidden = _apply(spec.model, params, stream.x, method="last_hidden")
    return jax.ops.segment_sum(hidden, owners, spec.shape.rows + spec.chunk_pages)


def commit(spec: StepSpec, arena: jax.Array, layers: list[LayerWords], inputs: StepInputs) -> jax.Array:
    """Writes what the layers encoded: decoded tokens, chunks' pages, and then residual pages that became full.

    Donate the arena. Everything else reads it before this writes it.
    """
    decode, chunk = inputs.decode, inputs.chunk
    offsets = decode.positions % spec.geometry.page_size
    for number, (group, own) in enumerate(zip(spec.groups, inputs.groups, strict=True)):
        formats = inputs.formats_of(number)
        writing, words = spec.writing(group), [layers[layer] for layer in group.layers]
        tokens = _stack([layer.tokens for layer in words])
        arena = write_tokens(writing, arena, tokens, own.decode_pages, offsets, formats.decode)
        if chunk is not None:
            pages = _stack([layer.pages for layer in words])
            arena = write_pages(writing, arena, pages, own.chunk_pages, formats.written)
        for i, kv_format in enumerate(spec.paged_formats.values()):
            pages_and_count = own.closing_sources[i], own.closing_targets[i], formats.closing_counts[i]
            arena = requantize(writing, spec.residual_of(kv_format), kv_format, arena, *pages_and_count)
    return arena


def _blank(spec: StepSpec, x: jax.Array, numbers: jax.Array) -> jax.Array:
    """Zeros in rows of x f32[N, hidden] whose number is negative, for the compiled kernels of CPUs: there rows of zeros
    take no time, and most models' layers leave them so. Other backends compute what pads a step."""
    return jnp.where(numbers[:, None] < 0, 0.0, x) if spec.implementation == "cpu" else x


def _apply(module: nn.Module, params: Params, *arguments: Any, **options: Any) -> Any:
    return module.apply({"params": params}, *arguments, **options)


def _stack(layers: list[dict[int, PageWords]]) -> dict[int, PageWords]:
    """The layers' words, by format id, along a new first axis."""
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
