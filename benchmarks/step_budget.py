"""Where the time of a decode step goes: each stage by itself, with the operations and bytes that it cannot do without.

    python benchmarks/step_budget.py --weights int8 --kv-precision int8 --rows 32 --tokens 160

The stages of a step are run one after the other, each waited for, as often as asked; medians are printed. A layer is
taken apart by running its products and its attention by themselves; the rest of a layer is what they leave. `step` is a
whole step as the engine takes it, with the host's work, and without waiting between stages.
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from decoding import start_decoding
from rich.console import Console
from rich.table import Table

from fineserve_jax.engine.compilation_cache import use_compilation_cache
from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.processor import processor_name
from fineserve_jax.models.weight_formats import weight_recipe
from fineserve_jax.pallas_kernels.cpu import library
from fineserve_jax.pallas_kernels.format_sizes import FORMAT_SIZES
from fineserve_jax.pallas_kernels.operations import paged_attention
from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.runner.inputs import StepInputs, build_inputs
from fineserve_jax.runner.sampling_inputs import build_sampling
from fineserve_jax.runner.shapes import StepSpec
from fineserve_jax.runner.step_programs import step_programs


@dataclasses.dataclass(frozen=True)
class Arguments:
    model: str = "smollm2-135m"
    weights: str = "bf16"
    kv_precision: str = "bf16"
    """Of the rows; several joined by + are dealt out in turn."""
    rows: int = 32
    tokens: int = 160
    """Cached tokens of each row, about."""
    rounds: int = 15
    clock: str = "wall"
    """wall, or cpu: seconds of all threads together, for machines with other work (one thread waits for none)."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage's time and what it cannot do without.

    Attributes:
        seconds: median.
        operations: multiplications and additions.
        bytes: read and written, each once.
    """

    seconds: float
    operations: float
    bytes: float


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    use_compilation_cache()
    report(arguments, measure(arguments, *make_engine(arguments)))


def make_engine(arguments: Arguments) -> tuple[Engine, list[Request]]:
    """An engine, and its requests, which have all their tokens cached and decode."""
    new_tokens = 4 * (arguments.rounds + arguments.rows)  # the first rows decode while the last are prefilled
    config = EngineConfig(
        kv_memory=512 << 20,
        max_batch_size=arguments.rows,
        max_seq_len=arguments.tokens + new_tokens,
        prefix_cache="off",
    )
    rng = np.random.default_rng(0)
    prompts = [rng.integers(1000, 20000, arguments.tokens).tolist() for _ in range(arguments.rows)]
    kv_precisions = arguments.kv_precision.split("+")
    return start_decoding(arguments.model, arguments.weights, config, prompts, kv_precisions, new_tokens)


def measure(arguments: Arguments, engine: Engine, requests: list[Request]) -> dict[str, Stage]:
    """Times whole steps, then the stages of one more step, over and over."""
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[arguments.clock]

    def median_of(call: Callable[[], object]) -> float:
        jax.block_until_ready(call())
        times = []
        for _ in range(arguments.rounds):
            start = clock()
            jax.block_until_ready(call())
            times.append(clock() - start)
        return statistics.median(times)

    step = median_of(engine.step)
    runner = engine.runner
    # The newest tokens that have been computed, once more: the pages of those that follow are not there yet.
    output = SchedulerOutput(tuple(ScheduledChunk(r, r.num_tokens - 2, 1) for r in requests), ())
    spec = runner._spec(runner._shape(output))
    programs = step_programs(spec)
    host, _ = build_inputs(spec, output, runner.kv)
    host = host._replace(sample_slots=np.arange(spec.shape.rows, dtype=np.int32))  # as if they were the newest
    inputs, sampling = jax.device_put((host, build_sampling(requests, spec.shape.rows, runner.max_seq_len)))
    stream = programs.embed(runner.params, inputs)

    def layers() -> object:
        x = stream
        for index, params in enumerate(runner.layer_params):
            kind, number = runner.place_of_layer[index]
            x, _ = programs.layers[kind](params, x, number, runner.arena.units, inputs)
        return x

    places = [runner.place_of_layer[index] for index in range(len(runner.layer_params))]
    words = [
        programs.layers[kind](params, stream, number, runner.arena.units, inputs)[1]
        for params, (kind, number) in zip(runner.layer_params, places, strict=True)
    ]

    def commit() -> object:
        runner.arena.units = programs.commit(runner.arena.units, words, inputs)
        return runner.arena.units

    times = {
        "embed": median_of(lambda: programs.embed(runner.params, inputs)),
        "layers": median_of(layers),
        "products": median_of(products_call(engine, spec.shape.rows)),
        "attention": median_of(attention_call(engine, spec, inputs)),
        "head": median_of(lambda: programs.head(runner.params, stream, inputs, sampling)),
        "commit": median_of(commit),
    }
    times["rest of the layers"] = max(0.0, times["layers"] - times["products"] - times["attention"])
    times["host"] = max(0.0, step - sum(times[name] for name in ("embed", "layers", "head", "commit")))
    work = least_work(engine, output)
    order = ("embed", "products", "attention", "rest of the layers", "head", "commit", "host")
    budget = {name: Stage(times[name], *work.get(name, (0.0, 0.0))) for name in order}
    return budget | {"step": Stage(step, *(sum(part) for part in zip(*work.values(), strict=True)))}


def products_call(engine: Engine, rows: int) -> Callable[[], object]:
    """The products of all layers, nothing else."""
    runner, config, recipe = engine.runner, engine.runner.model.config, weight_recipe(engine.runner.model.weights)
    rng, hidden = np.random.default_rng(0), config.hidden_size
    matrices = (
        ("attn", "qkv", hidden),
        ("attn", "o", config.qkv_sizes[0]),
        ("mlp", "gate_up", hidden),
        ("mlp", "down", config.intermediate_size),
    )
    vectors = [jnp.asarray(rng.standard_normal((rows, width), np.float32)) for _, _, width in matrices]

    @jax.jit
    def layer(params: dict, vectors: list[jax.Array]) -> list[jax.Array]:
        products = zip(matrices, vectors, strict=True)
        return [recipe.linear.dot(params[part][name], x) for (part, name, _), x in products]

    return lambda: [layer(params, vectors) for params in runner.layer_params]


def attention_call(engine: Engine, spec: StepSpec, inputs: StepInputs) -> Callable[[], object]:
    """The decode attention of all layers to cached tokens, nothing else."""
    runner, config = engine.runner, engine.runner.model.config
    q = jnp.ones((spec.shape.rows, config.num_heads, config.head_dim), jnp.float32)
    attends = [jax.jit(functools.partial(paged_attention, spec.decode_attention(group))) for group in spec.groups]

    def call() -> object:
        places, arena = runner.place_of_layer.values(), runner.arena.units
        return [attends[group](q, arena, inputs.groups[group].decode_tiles, number) for (group, _), number in places]

    return call


def least_work(engine: Engine, output: SchedulerOutput) -> dict[str, tuple[float, float]]:
    """Of each stage the operations and the bytes that it cannot do without; rows that pad a step are not counted."""
    runner, config, rows = engine.runner, engine.runner.model.config, len(output.decodes)
    linear = [
        leaf for params in runner.layer_params for part in ("attn", "mlp") for leaf in jax.tree.leaves(params[part])
    ]
    q, k, v = config.qkv_sizes
    weights = config.hidden_size * (q + k + v + q + 3 * config.intermediate_size) * config.num_layers
    head = runner.params.get("lm_head", runner.params["embed"])
    tokens = [chunk.start for chunk in output.decodes]
    value_bytes = [
        FORMAT_SIZES[chunk.request.kv_precision].bits_per_value(runner.geometry) / 8 for chunk in output.decodes
    ]
    kept = 2 * config.num_layers * config.num_kv_heads * config.head_dim  # values of a token
    cached = sum(kept * count * size for count, size in zip(tokens, value_bytes, strict=True))
    return {
        "embed": (0.0, rows * config.hidden_size * 4.0),
        "products": (2.0 * rows * weights, sum(leaf.nbytes for leaf in linear)),
        "attention": (4.0 * sum(tokens) * config.num_layers * config.num_heads * config.head_dim, cached),
        "head": (
            2.0 * rows * config.vocab_size * config.hidden_size,
            sum(leaf.nbytes for leaf in jax.tree.leaves(head)),
        ),
        "commit": (0.0, 2.0 * sum(kept * size for size in value_bytes)),
    }


def machine() -> str:
    """The processor, and which of its instruction sets the compiled kernels use."""
    kernels = "not built" if library.why_unavailable() else library.instruction_set()
    return f"{processor_name()}; compiled kernels: {kernels}"


def report(arguments: Arguments, budget: dict[str, Stage]) -> None:
    step = budget["step"].seconds
    table = Table("stage", "ms", "of the step", "million operations", "MB", "Gop/s", "GB/s")
    for name, stage in budget.items():
        rates = (stage.operations / stage.seconds / 1e9, stage.bytes / stage.seconds / 1e9) if stage.seconds else (0, 0)
        numbers = [f"{x:.1f}" if x else "" for x in (stage.operations / 1e6, stage.bytes / 1e6, *rates)]
        table.add_row(name, f"{stage.seconds * 1e3:.2f}", f"{stage.seconds / step:.0%}", *numbers)
    console = Console(highlight=False)
    console.print(f"{machine()}; {arguments.weights} weights, {arguments.rows} rows, {arguments.kv_precision} caches")
    console.print(table)
    console.print(f"{arguments.rows / step:.1f} tokens a second")
    stages_ms = {name: round(stage.seconds * 1e3, 3) for name, stage in budget.items()}
    print(json.dumps({**dataclasses.asdict(arguments), "machine": machine(), "ms": stages_ms}))


if __name__ == "__main__":
    main()
