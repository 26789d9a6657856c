"""From a model and settings to the parts of an engine: page geometry, KV manager, scheduler, runner."""

import logging
from collections.abc import Iterable
from typing import NamedTuple

import jax

from fineserve_jax.config import EngineConfig
from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.slab_size import choose_slab_units
from fineserve_jax.kv.slabs import SlabAllocator
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.memory import format_bytes, host_memory_bytes, kv_memory_bytes
from fineserve_jax.models import ModelConfig, build_model
from fineserve_jax.pallas_kernels.formats import get_format
from fineserve_jax.pallas_kernels.geometry import PageGeometry, choose_unit_words
from fineserve_jax.pallas_kernels.implementation import Implementation, default_implementation, is_interpreted
from fineserve_jax.pallas_kernels.writing import NOWHERE
from fineserve_jax.runner.page_operations import PageOperations
from fineserve_jax.runner.roofline import device_roofline
from fineserve_jax.runner.runner import ModelRunner
from fineserve_jax.scheduler import FormatCost, ModelCost, Scheduler

log = logging.getLogger(__name__)

DEFAULT_MAX_SEQ_LEN = 2048
WORD_BYTES = 2


class EngineParts(NamedTuple):
    kv: KVManager
    scheduler: Scheduler
    runner: ModelRunner
    max_seq_len: int


def assemble(model: LoadedModel, config: EngineConfig) -> EngineParts:
    """Builds the parts of an engine. Raises `ConfigError` for settings that the model or the device rules out."""
    device = jax.devices()[0]
    implementation = kernel_implementation()
    max_seq_len = _max_seq_len(model, config)
    geometry = page_geometry(model.config, config.page_size, tpu=implementation == "mosaic_tpu")
    classes = page_classes(model.name, geometry, config.served_formats)
    size = kv_memory_bytes(config.kv_memory, device)
    kv = _kv_manager(config, geometry, classes, size)
    _check_one_request_fits(kv, model.name, config, max_seq_len, size)
    cost = model_cost(model, geometry, config.served_formats)
    scheduler = Scheduler(config.scheduler(), kv, {model.name: cost}, device_roofline(device))
    operations = PageOperations({model.name: geometry}, kv.allocator.slab_units, implementation)
    longest = -(-max_seq_len // config.page_size) * config.page_size
    runner = ModelRunner(
        build_model(model.config, model.weights),
        model.params,
        geometry,
        kv.allocator.num_units,
        kv,
        operations,
        max_rows=config.max_batch_size,
        max_chunk_tokens=config.max_chunk_tokens if config.chunked_prefill else max(longest, config.max_chunk_tokens),
        max_seq_len=max_seq_len,
        implementation=implementation,
    )
    return EngineParts(kv, scheduler, runner, max_seq_len)


def kernel_implementation() -> Implementation:
    """Whose kernels the engine calls. Raises `ConfigError` if the environment names none that there is."""
    try:
        implementation = default_implementation()
    except ValueError as error:
        raise ConfigError(str(error)) from None
    if is_interpreted(implementation):
        log.warning("%s kernels are interpreted on this platform: right, but very slow", implementation)
    return implementation


def page_geometry(model: ModelConfig, page_size: int, *, tpu: bool = False) -> PageGeometry:
    """How the model's pages lie in an arena."""
    unit_words = choose_unit_words(model.head_dim, page_size, tpu=tpu)
    return PageGeometry(model.num_layers, model.num_kv_heads, model.head_dim, page_size, unit_words)


def page_classes(model: str, geometry: PageGeometry, formats: Iterable[str]) -> dict[tuple[str, str], PageClass]:
    """The page class of each format, and of the tails they need, by model and format name."""
    classes: dict[tuple[str, str], PageClass] = {}

    def add(name: str) -> PageClass:
        if (model, name) not in classes:
            kv_format = get_format(name)
            classes[model, name] = PageClass(
                model=model,
                kv_format=name,
                page_units=kv_format.page_units(geometry),
                page_size=geometry.page_size,
                page_bytes=geometry.num_layers * kv_format.words_per_layer(geometry) * WORD_BYTES,
                tail=None if kv_format.tail is None else add(kv_format.tail),
            )
        return classes[model, name]

    for name in formats:
        add(name)
    return classes


def model_cost(model: LoadedModel, geometry: PageGeometry, formats: Iterable[str]) -> ModelCost:
    """What a step of this model costs, for the scheduler's predictions."""
    leaves = jax.tree.leaves(model.params)
    shape = model.config
    per_layer = shape.hidden_size * (sum(shape.qkv_sizes) + shape.qkv_sizes[0] + 3 * shape.intermediate_size)
    costs = {}
    for name in formats:
        kv_format = get_format(name)
        token_bytes = geometry.num_layers * kv_format.words_per_layer(geometry) * WORD_BYTES / geometry.page_size
        costs[name] = FormatCost(kv_format.bits_per_value(geometry), token_bytes)
    return ModelCost(
        flops_per_token=2 * (shape.num_layers * per_layer + shape.vocab_size * shape.hidden_size),
        flops_per_pair=4 * shape.num_layers * shape.num_heads * shape.head_dim,
        weight_bytes=sum(leaf.nbytes for leaf in leaves),
        formats=costs,
    )


def _max_seq_len(model: LoadedModel, config: EngineConfig) -> int:
    limit = model.config.max_position
    if model.config.sliding_window is not None:
        limit = min(limit, model.config.sliding_window)  # up to here the window hides nothing
    if config.max_seq_len is None:
        return min(DEFAULT_MAX_SEQ_LEN, limit)
    if config.max_seq_len > limit:
        raise ConfigError(
            f"max_seq_len={config.max_seq_len} is more than the {limit} tokens that {model.name} can attend to here; "
            f"use at most {limit}"
        )
    return config.max_seq_len


def _kv_manager(
    config: EngineConfig, geometry: PageGeometry, classes: dict[tuple[str, str], PageClass], size: int
) -> KVManager:
    unit_bytes = geometry.unit_words * WORD_BYTES
    num_units = min(size // unit_bytes, NOWHERE)
    longest = max(page_class.page_units for page_class in classes.values())
    if num_units < 2 * longest:
        raise ConfigError(
            f"kv_memory={format_bytes(size)} is too small for one request: a page alone takes up to "
            f"{format_bytes(longest * unit_bytes)}; give at least {format_bytes(64 * longest * unit_bytes)}"
        )
    slab_units = choose_slab_units([page_class.page_units for page_class in classes.values()], num_units)
    allocator = SlabAllocator(
        num_units, slab_units, config.slab_policy, classes.values(), config.slab_shares, unit_bytes=unit_bytes
    )
    return KVManager(
        allocator,
        classes,
        prefix_cache=config.prefix_cache,
        reserve_slabs=_reserve_slabs(allocator.num_slabs),
        host_bytes=size if config.swap_memory is None else host_memory_bytes(config.swap_memory),
    )


def _reserve_slabs(num_slabs: int) -> int:
    """Free slabs to keep at hand: 2 or one in 64, but none of an arena that has few."""
    return min(max(2, num_slabs // 64), num_slabs // 8)


def _check_one_request_fits(kv: KVManager, model: str, config: EngineConfig, max_seq_len: int, size: int) -> None:
    longest = kv.max_tokens_alone(model, config.kv_precision)
    if longest < max_seq_len:
        wanted = format_bytes(1.2 * size * max_seq_len / max(longest, config.page_size))
        remedy = f"give about {wanted}, or use a narrower kv_precision or a smaller max_seq_len"
        if config.slab_policy == "partitioned":
            remedy += f", or a larger share of {config.kv_precision} in slab_shares"
        raise ConfigError(
            f"kv_memory={format_bytes(size)} is too small for one request: it holds {longest} tokens in "
            f"{config.kv_precision}, max_seq_len is {max_seq_len}; {remedy}"
        )
