"""One whole step of an engine over 8 chips, stage by stage, of models that need several; parameters are shapes only."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.aot.cases import ARENA_WORDS, IMPLEMENTATION, Model, shapes_of
from benchmarks.aot.step_cases import CHUNK_TOKENS, CONTEXT, FORMATS, ROWS, WEIGHTS
from benchmarks.aot.targets import Platform
from fineserve_jax.models import ModelConfig, build_model
from fineserve_jax.models.sharding import param_specs
from fineserve_jax.request.request import SchedulerOutput
from fineserve_jax.runner import step
from fineserve_jax.runner.inputs import build_inputs
from fineserve_jax.runner.mesh import SAME, SHARDED, Specs, over_mesh, specs_of
from fineserve_jax.runner.sampling_inputs import build_sampling
from fineserve_jax.runner.shapes import StepShape, StepSpec

FLOAT_BYTES = 4  # of what is added up and gathered
CONFIGS = {
    Model("Llama-3.1-70B", 80, 64, 8, 128): ModelConfig(
        family="llama",
        vocab_size=128256,
        hidden_size=8192,
        num_layers=80,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=28672,
        rope_theta=500000.0,
        max_position=131072,
    ),
    Model("Qwen3-32B", 64, 64, 8, 128): ModelConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=5120,
        num_layers=64,
        num_heads=64,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=25600,
        rope_theta=1000000.0,
        max_position=40960,
        qk_norm=True,
    ),
}


@dataclass(frozen=True)
class MeshCase:
    """A stage of a step over a mesh.

    Attributes:
        operation, model: what the table calls it.
        head_dim: of the model.
        function, arguments: what is compiled, for which shapes and shardings.
        collective_bytes: what each device has to be given by collectives.
        donate: arguments whose memory the results may take.
    """

    operation: str
    model: str
    head_dim: int
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    collective_bytes: int
    donate: tuple[int, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.operation}, {self.model}, {'+'.join(FORMATS)}"


def mesh_cases(platform: Platform, mesh: Mesh) -> Iterator[MeshCase]:
    """The stages of a step that decodes and prefills, with three formats in it, on a mesh of the axis `SHARDS`."""
    for model, config in CONFIGS.items():
        yield from _stages(platform, mesh, model, config)


def _stages(platform: Platform, mesh: Mesh, model: Model, config: ModelConfig) -> Iterator[MeshCase]:
    shards = mesh.size
    geometry = dataclasses.replace(model, kv_heads=config.of_shard(shards).num_kv_heads).geometry(platform)
    spec = StepSpec(
        build_model(config, WEIGHTS, shards),
        geometry,
        FORMATS,
        StepShape(ROWS, CHUNK_TOKENS),
        CONTEXT // geometry.page_size,
        implementation=IMPLEMENTATION[platform],
        interpret=False,
        mesh=mesh,
    )
    params = abstract_shards(config, mesh)
    host_inputs, _ = build_inputs(spec, SchedulerOutput((), ()), None)  # an empty plan asks nothing
    placed = functools.partial(_placed, mesh)
    inputs, sampling = placed(SAME, shapes_of((host_inputs, build_sampling([], ROWS, CONTEXT))))
    num_units = shards * (ARENA_WORDS // geometry.unit_words)
    arena = placed(SHARDED, jax.ShapeDtypeStruct((num_units, *geometry.unit_shape), jnp.uint16))
    number = placed(SAME, jax.ShapeDtypeStruct((), jnp.int32))
    residual, all_logits = (ROWS + CHUNK_TOKENS) * config.hidden_size, ROWS * spec.model.vocab_rows * shards

    def stage(
        name: str,
        program: Callable[..., Any],
        specs: Sequence[Specs],
        arguments: tuple[Any, ...],
        values: int,
        result: Any = SAME,
        donate: tuple[int, ...] = (),
    ) -> MeshCase:
        """`values`: numbers that collectives have to give each device."""
        function = over_mesh(mesh, functools.partial(program, spec), specs, result)
        return MeshCase(
            f"step over {shards}: {name}", model.name, model.head_dim, function, arguments, FLOAT_BYTES * values, donate
        )

    of_params = specs_of(config)
    embed = stage("embed", step.embed, [of_params, SAME], (params, inputs), residual)
    yield embed
    stream = placed(SAME, shapes_of(jax.eval_shape(embed.function, *embed.arguments)))

    def one_layer(spec: StepSpec, *arguments: Any) -> Any:
        return step.layer(spec, 0, True, *arguments)  # of the only group, with RoPE

    arguments = (params["layers_0"], stream, number, arena, inputs)
    specs = [of_params, SAME, SAME, SHARDED, SAME]
    layer = stage("layer", one_layer, specs, arguments, 2 * residual, (SAME, SHARDED))
    yield layer
    words = placed(SHARDED, shapes_of(jax.eval_shape(layer.function, *layer.arguments)[1]))
    arguments = (params, stream, inputs, sampling)
    yield stage("head", step.head, [of_params, SAME, SAME, SAME], arguments, all_logits)
    arguments, specs = (arena, [words] * config.num_layers, inputs), [SHARDED, SHARDED, SAME]
    yield stage("commit", step.commit, specs, arguments, 0, SHARDED, donate=(0,))


def _placed(mesh: Mesh, spec: PartitionSpec, tree: Any) -> Any:
    """Shapes, with where they lie on the mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def abstract_shards(config: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """The parameters of all devices as shapes: what the model of one declares, as often along the divided axes."""
    module = build_model(config, WEIGHTS, mesh.size)
    tokens = jax.ShapeDtypeStruct((1,), jnp.int32)

    def declare(tokens: jax.Array) -> Any:
        return module.init(jax.random.key(0), tokens, tokens, method="declare")["params"]

    over = jax.shard_map(declare, mesh=mesh.abstract_mesh, in_specs=SAME, out_specs=SAME, check_vma=False)
    own = jax.eval_shape(over, tokens)

    def whole(spec: PartitionSpec, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        axes = [*spec, *[None] * (len(leaf.shape) - len(spec))]
        shape = [size * (1 if axis is None else mesh.size) for size, axis in zip(leaf.shape, axes, strict=True)]
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, spec))

    specs = param_specs(config, own)
    return dict(jax.tree.map(whole, specs, own, is_leaf=lambda spec: isinstance(spec, PartitionSpec)))
