"""From models and settings to the parts of an engine: page geometries, KV manager, scheduler, arena, runners."""

import dataclasses
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax

from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.memory import format_bytes, host_capacity_bytes, host_memory_bytes, kv_memory_bytes
from fineserve_jax.engine.model_settings import ModelSettings
from fineserve_jax.engine.page_shapes import (
    WORD_BYTES,
    bits_per_value,
    group_geometry,
    page_classes,
    page_geometries,
)
from fineserve_jax.engine.precision import resolve_precision
from fineserve_jax.engine.recipes import formats_by_layer, split_layers
from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.loaders import LoadedModel, Tokenizer
from fineserve_jax.models import LayerGroup, Params, build_model
from fineserve_jax.pallas_kernels.arena import NOWHERE
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.pallas_kernels.geometry import PageGeometry
from fineserve_jax.pallas_kernels.implementation import (
    VARIABLE,
    Implementation,
    default_implementation,
    is_interpreted,
    missing_kernels,
)
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.mesh import DeviceGroup, device_group, per_device_bytes
from fineserve_jax.runner.page_operations import PageOperations
from fineserve_jax.runner.runner import ModelRunner
from fineserve_jax.scheduler import FormatCost, ModelCost, Scheduler
from fineserve_jax.scheduler.costs import dense_layer_parameters, pair_flops
from fineserve_jax.scheduler.devices import device_roofline
from fineserve_jax.scheduler.speculation import Speculation

log = logging.getLogger(__name__)

DEFAULT_MAX_SEQ_LEN = 2048


@dataclass(frozen=True, slots=True)
class KnownModel:
    """What requests for a model are checked against.

    Attributes:
        name: what requests call it.
        model: its weights and tokenizer.
        config: the engine's settings as this model has them: its `kv_precision` and `max_seq_len` may be its own.
        formats: KV formats that its requests may name, as of its construction: those registered later have no pages.
        geometry: of its pages.
        max_seq_len: most tokens of its requests.
    """

    name: str
    model: LoadedModel
    config: EngineConfig
    formats: tuple[str, ...]
    geometry: PageGeometry
    max_seq_len: int

    @property
    def tokenizer(self) -> Tokenizer:
        return self.model.tokenizer

    @property
    def layer_groups(self) -> tuple[LayerGroup, ...]:
        """The model's layers whose pages are apart: by how far back they attend, and by how recipes keep them."""
        return split_layers(self.model.config.layer_groups, self._recipes())

    def formats_of(self, precision: str) -> frozenset[str]:
        """The KV formats that a KV precision keeps the model's layers in: itself, or those of a recipe."""
        return frozenset(self._recipes().get(precision, (precision,)))

    def _recipes(self) -> dict[str, tuple[str, ...]]:
        return formats_by_layer(self.config.kv_recipes, self.model.config.num_layers)


@dataclass(frozen=True, slots=True)
class ServedModel(KnownModel):
    """A model in an engine. `runner`: computes its steps."""

    runner: ModelRunner


class EngineBooks(NamedTuple):
    """What is known of an engine before it takes memory on a device.

    Attributes:
        models: by the names that requests use; their weights are not looked at.
        kv: the host's half of the cache; of several devices that of each, since all are alike.
    """

    group: DeviceGroup
    implementation: Implementation
    models: dict[str, KnownModel]
    allocator: SlabAllocator
    kv: KVManager


class EngineParts(NamedTuple):
    kv: KVManager
    scheduler: Scheduler
    arena: Arena
    operations: PageOperations
    models: dict[str, ServedModel]


def build_books(
    models: Mapping[str, LoadedModel],
    config: EngineConfig,
    settings: Mapping[str, ModelSettings],
    devices: Sequence[jax.Device] | None = None,
) -> EngineBooks:
    """What can be said of an engine from its models' configurations; for the arguments see `build_engine`.

    Raises:
        ConfigError: settings that a model or the device rules out, or that are for no model.
    """
    group = device_group(config.tensor_parallel, devices)
    for model in models.values():
        group.check(model.config, model.weights)
    implementation = kernel_implementation()
    configs = _model_configs(models, config, settings)
    limits = {name: max_seq_len_of(name, model, configs[name]) for name, model in models.items()}
    tpu = get_backend(implementation).tile_units
    geometries = page_geometries(models, config.page_size, tpu=tpu, shards=group.size)
    classes: dict[tuple[str, str], PageClass] = {}
    for name, geometry in geometries.items():
        classes |= classes_of(name, models[name], geometry, config, limits[name])
    if unknown := [name for name in config.quotas if name.startswith("model:") and name[6:] not in models]:
        raise ConfigError(
            f"there is a quota for {unknown[0]!r}, which is not served; the models are: {', '.join(models)}"
        )
    size = kv_memory_bytes(config.kv_memory, group.devices)
    unit_words = next(iter(geometries.values())).unit_words
    allocator = _allocator(config, unit_words, classes, size)
    kv = _kv_manager(config, allocator, classes, size, group.size)
    known = {}
    for name, model in models.items():
        check_one_request_fits(kv, name, configs[name], limits[name], size)
        formats = configs[name].served_formats
        known[name] = KnownModel(name, model, configs[name], formats, geometries[name], limits[name])
    return EngineBooks(group, implementation, known, allocator, kv)


def build_engine(
    models: Mapping[str, LoadedModel],
    config: EngineConfig,
    settings: Mapping[str, ModelSettings],
    devices: Sequence[jax.Device] | None = None,
) -> EngineParts:
    """Builds the parts of an engine.

    Args:
        models: what it serves, by the names that requests use.
        config: its settings.
        settings: of single models, where they differ; by name.
        devices: the first `tensor_parallel` of these compute its steps; None: of all that JAX finds.

    Raises:
        ConfigError: settings that a model or the device rules out, or that are for no model.
    """
    group, implementation, known, allocator, kv = build_books(models, config, settings, devices)
    if config.num_speculative_tokens and not get_backend(implementation).writes_beside:
        raise ConfigError(
            f"num_speculative_tokens={config.num_speculative_tokens}: {implementation} kernels write one new token of "
            "a page in a step; leave num_speculative_tokens out"
        )
    placed = _placed({name: model.model for name, model in known.items()}, group)
    known = {name: dataclasses.replace(model, model=placed[name]) for name, model in known.items()}
    costs = {name: model_cost(model, kv, group.size) for name, model in known.items()}
    arena = Arena(next(iter(known.values())).geometry, allocator.num_units, group)
    operations = PageOperations(arena, {}, allocator.slab_units, implementation)
    served = {}
    for name, model in known.items():
        operations.geometries |= group_geometries(model)
        served[name] = served_model(model, arena, kv, config, implementation)
    row_sizes = {name: model.runner.row_buckets for name, model in served.items()}
    speculation, device = Speculation(config.num_speculative_tokens, row_sizes), group.devices[0]
    scheduler = Scheduler(config, kv, costs, device_roofline(device.platform, device.device_kind), speculation)
    return EngineParts(kv, scheduler, arena, operations, served)


def _placed(models: Mapping[str, LoadedModel], group: DeviceGroup) -> dict[str, LoadedModel]:
    """The models with their weights on the devices; those that share weights still do."""
    tables: dict[int, Params] = {}
    for model in models.values():
        if id(model.params) not in tables:
            tables[id(model.params)] = group.place_all(model.config, model.weights, model.params)
    return {name: dataclasses.replace(model, params=tables[id(model.params)]) for name, model in models.items()}


def kernel_implementation() -> Implementation:
    """Whose kernels the engine calls. Raises `ConfigError` if the environment names none that there is."""
    try:
        implementation = default_implementation()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if implementation == "xla" and not os.environ.get(VARIABLE) and (reason := missing_kernels()):
        log.warning("%s; until then XLA does their work, several times slower", reason)
    if is_interpreted(implementation):
        log.warning("%s kernels are interpreted on this platform: right, but very slow", implementation)
    return implementation


def classes_of(
    name: str, model: LoadedModel, geometry: PageGeometry, config: EngineConfig, max_seq_len: int
) -> dict[tuple[str, str], PageClass]:
    """The classes of a model's pages, by model and KV format."""
    try:
        recipes = formats_by_layer(config.kv_recipes, model.config.num_layers)
    except ConfigError as error:
        raise ConfigError(f"model {name!r}: {error}") from None
    groups, step_tokens = split_layers(model.config.layer_groups, recipes), _max_chunk_tokens(config, max_seq_len)
    return page_classes(name, geometry, config.served_formats, groups, step_tokens, recipes)


def group_geometries(model: KnownModel) -> dict[tuple[str, int], PageGeometry]:
    """How the pages of a model lie in the arena, by its name and the number of the layer group."""
    groups = enumerate(model.layer_groups)
    return {(model.name, number): group_geometry(model.geometry, group) for number, group in groups}


def served_model(
    model: KnownModel, arena: Arena, kv: KVManager, config: EngineConfig, implementation: Implementation
) -> ServedModel:
    """The model with what computes its steps. `config`: the engine's."""
    runner = _runner(model, arena, kv, config, implementation)
    return ServedModel(model.name, model.model, model.config, model.formats, model.geometry, model.max_seq_len, runner)


def model_cost(known: KnownModel, kv: KVManager, shards: int = 1) -> ModelCost:
    """What a step of this model costs each of the devices that share it, for the scheduler's predictions; of all KV
    precisions that its pages may be in: those that requests name, and their residuals."""
    model, geometry = known.model, known.geometry
    leaves = jax.tree.leaves(model.params)
    shape = model.config.of_shard(shards)
    attention = shape.hidden_size, shape.num_heads, shape.num_kv_heads, shape.head_dim
    widths = [shape.mlp_width(layer) for layer in range(shape.num_layers)]
    costs = {
        precision: FormatCost(bits_per_value(kept, geometry), kept.bytes_of_groups / geometry.page_size)
        for (served, precision), kept in kv.classes.items()
        if served == known.name
    }
    return ModelCost(
        flops_per_token=2 * sum(dense_layer_parameters(*attention, width) for width in widths),
        flops_per_pair=pair_flops(shape.num_layers, shape.num_heads, shape.head_dim),
        weight_bytes=sum(map(per_device_bytes, leaves)),
        formats=costs,
    )


def _model_configs(
    models: Mapping[str, LoadedModel], config: EngineConfig, settings: Mapping[str, ModelSettings]
) -> dict[str, EngineConfig]:
    """Each model's settings, by name."""
    if not models:
        raise ConfigError("the engine was given no model; give at least one")
    if unknown := [name for name in settings if name not in models]:
        raise ConfigError(f"settings are for the model {unknown[0]!r}; the models are: {', '.join(models)}")
    return {name: settings[name].over(config) if name in settings else config for name in models}


def _runner(
    served: KnownModel, arena: Arena, kv: KVManager, config: EngineConfig, implementation: Implementation
) -> ModelRunner:
    model, max_seq_len = served.model, served.max_seq_len
    kept = {own.kv_format for (name, _), first in kv.classes.items() if name == served.name for own in first.groups}
    return ModelRunner(
        build_model(model.config, model.weights, arena.group.size),
        model.params,
        served.geometry,
        arena,
        kv,
        max_rows=max(config.max_batch_size, 1 + config.num_speculative_tokens),
        max_chunk_tokens=_max_chunk_tokens(config, max_seq_len),
        max_seq_len=max_seq_len,
        implementation=implementation,
        check_finite=config.check_finite,
        eos_ids=[token for token in model.tokenizer.eos_token_ids if token < model.config.vocab_size],
        reproducible=config.reproducible,
        formats=kept if config.reproducible else (),
        layer_groups=served.layer_groups if config.kv_recipes else (),
        drafts=config.num_speculative_tokens > 0,
        looks_ahead=config.async_scheduling,
        shares=implementation == "cpu",  # elsewhere nobody has measured whether it pays
    )


def _max_chunk_tokens(config: EngineConfig, max_seq_len: int) -> int:
    """Most prefill tokens of a step: without chunks a whole prompt's."""
    longest = -(-max_seq_len // config.page_size) * config.page_size
    return config.max_chunk_tokens if config.chunked_prefill else max(longest, config.max_chunk_tokens)


def max_seq_len_of(name: str, model: LoadedModel, config: EngineConfig) -> int:
    """Most tokens of a model's requests. Raises `ConfigError` if it cannot attend to so many."""
    limit = model.config.max_position
    if config.max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, limit)
    if config.max_seq_len > limit:
        raise ConfigError(
            f"max_seq_len={config.max_seq_len} is more than the {limit} tokens that {name} can attend to here; "
            f"use at most {limit}"
        )
    return config.max_seq_len


def _allocator(
    config: EngineConfig, unit_words: int, classes: dict[tuple[str, str], PageClass], size: int
) -> SlabAllocator:
    unit_bytes = unit_words * WORD_BYTES
    num_units = min(size // unit_bytes, NOWHERE)
    lengths = [group.page_units for page_class in classes.values() for group in page_class.groups]
    longest = max(lengths)
    if num_units < 2 * longest:
        raise ConfigError(
            f"kv_memory={format_bytes(size)} is too small for one request: a page alone takes up to "
            f"{format_bytes(longest * unit_bytes)}; give at least {format_bytes(64 * longest * unit_bytes)}"
        )
    slab_units = choose_slab_units(lengths, num_units)
    return SlabAllocator(
        num_units, slab_units, config.slab_policy, classes.values(), config.slab_shares, unit_bytes=unit_bytes
    )


def _kv_manager(
    config: EngineConfig, allocator: SlabAllocator, classes: dict[tuple[str, str], PageClass], size: int, shards: int
) -> KVManager:
    return KVManager(
        allocator,
        classes,
        prefix_cache=config.prefix_cache,
        reserve_slabs=_reserve_slabs(allocator.num_slabs),
        host_bytes=_host_bytes(config, size, shards),
        chunk_pages=config.max_chunk_tokens // config.page_size if config.reproducible else None,
    )


def _host_bytes(config: EngineConfig, size: int, shards: int) -> int:
    """Host memory for preempted requests: as much as the arena unless another size is set, and none if never used; of
    several devices each one's part of it, as the books are of one."""
    if config.preemption == "recompute":
        return 0
    if config.swap_memory is None:
        return min(size, host_capacity_bytes() // 4 // shards)
    return host_memory_bytes(config.swap_memory) // shards


def _reserve_slabs(num_slabs: int) -> int:
    """Free slabs to keep at hand: 2 or one in 64, but none of an arena that has few."""
    return min(max(2, num_slabs // 64), num_slabs // 8)


def check_one_request_fits(kv: KVManager, model: str, config: EngineConfig, max_seq_len: int, size: int) -> None:
    """Raises `ConfigError` if the longest request of a model that says nothing does not fit an empty memory.

    Args:
        config: the engine's settings as the model has them.
        size: bytes of the memory.
    """
    try:
        kv_precision = resolve_precision(
            kv, model, config.served_formats, config.kv_precision, config.min_kv_precision, max_seq_len
        ).start
    except RequestError as error:
        raise ConfigError(str(error)) from None
    longest = kv.max_tokens_alone(model, kv_precision)
    if longest < max_seq_len:
        wanted = format_bytes(1.2 * size * max_seq_len / max(longest, config.page_size))
        remedy = f"give about {wanted}, or use a narrower kv_precision or a smaller max_seq_len"
        if config.slab_policy == "partitioned":
            remedy += f", or a larger share of {kv_precision} in slab_shares"
        raise ConfigError(
            f"kv_memory={format_bytes(size)} is too small for one request: it holds {longest} tokens in "
            f"{kv_precision} of {model}, max_seq_len is {max_seq_len}; {remedy}"
        )
