"""Models that come and go while others are served. Their pages take slabs as those of all models do, and leave them to
the others; the arena keeps its size, and programs of models that stay are not compiled again.

    read      on any thread: is there room? Then the weights are loaded
    add       between two steps: requests may name it from now on
    refusing  nobody else may name it, while those that did are served to their ends
    remove    between two steps, when there are none left
"""

import dataclasses
import gc
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import jax

from fineserve_jax.engine.build import (
    KnownModel,
    ServedModel,
    check_one_request_fits,
    classes_of,
    group_geometries,
    max_seq_len_of,
    model_cost,
    served_model,
)
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.freed_memory import give_back_freed_memory
from fineserve_jax.engine.memory import format_bytes, free_memory_bytes
from fineserve_jax.engine.model_settings import ModelSettings, ModelSource
from fineserve_jax.engine.page_shapes import WORD_BYTES, geometry_in_units
from fineserve_jax.engine.recovery import Recovery
from fineserve_jax.errors import ConfigError, ModelNotServedError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.quotas import QuotaAccount
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.loaders.load import describe_model
from fineserve_jax.models import abstract_params
from fineserve_jax.pallas_kernels.backends import get_backend
from fineserve_jax.runner.arena import Arena
from fineserve_jax.runner.mesh import DeviceGroup
from fineserve_jax.runner.page_operations import PageOperations
from fineserve_jax.scheduler import Scheduler, load_profiles


class ModelLoading:
    """Changes which models an engine serves.

    Args:
        models: of the engine, by name; changed in place between two steps, so that other threads copy it before they
            go through it.
        config: of the engine.
        kv, scheduler, arena, operations, recovery: its parts.

    Attributes:
        num_compilations: programs that were compiled for models that are gone.
    """

    def __init__(
        self,
        models: dict[str, ServedModel],
        config: EngineConfig,
        kv: KVManager,
        scheduler: Scheduler,
        arena: Arena,
        operations: PageOperations,
        recovery: Recovery,
    ) -> None:
        self._models, self._config, self._kv, self._scheduler = models, config, kv, scheduler
        self._arena, self._operations, self._recovery = arena, operations, recovery
        self._geometry = next(iter(models.values())).geometry
        self._refused: set[str] = set()
        # One thread, since malloc keeps freed memory for the thread that had it.
        self._reader = ThreadPoolExecutor(1, "model-loading")
        self.num_compilations = 0

    # -- on any thread -------------------------------------------------------------------------------------------

    def read(self, name: str, source: ModelSource) -> LoadedModel:
        """Loads a model that is to be added, one at a time, so that no two count on the same memory.

        Raises:
            ConfigError: see `Engine.load_model`; before weights are read.
            ModelLoadError: see `loaders.load_model`.
        """
        return self._reader.submit(self._read, name, source).result()

    def _read(self, name: str, source: ModelSource) -> LoadedModel:
        self._check_can_add(name)
        weights = source.weights or self._config.weights
        described = describe_model(source.model, weights)
        self._known(name, described, source)
        _check_room(name, described, self._arena.group)
        return dataclasses.replace(load_model(source.model, weights, self._arena.group), name=name)

    def check_served(self, model: KnownModel) -> None:
        """Raises `ModelNotServedError` for a model that is not, or that is about to go."""
        if model.name in self._refused:
            raise ModelNotServedError(f"model={model.name!r} is being unloaded; choose another one")
        if self._models.get(model.name) is not model:
            known = ", ".join(self._models) or "none, until one is loaded"
            raise ModelNotServedError(f"model={model.name!r} was unloaded meanwhile; those served are: {known}")

    # -- between two steps ---------------------------------------------------------------------------------------

    def add(self, name: str, model: LoadedModel, settings: ModelSettings) -> None:
        """Serves a model from now on. Raises `ConfigError`, see `Engine.load_model`; then nothing has changed."""
        self._check_can_add(name)
        group = self._arena.group
        model = dataclasses.replace(model, params=group.place_all(model.config, model.weights, model.params))
        known, classes = self._known(name, model, settings)
        served = served_model(known, self._arena, self._kv, self._config, self._operations.implementation)
        with self._recovery.changing():
            self._kv.unregister(name)  # what is left of a call that was cut short
            for page_class in classes.values():
                self._kv.register(page_class)
            self._operations.geometries |= group_geometries(known)
            cost = model_cost(known, self._kv, group.size)
            self._scheduler.add_model(name, cost, served.runner.row_buckets)
            self._models[name] = served
        profiles = self._config.step_profile
        if profiles is not None and Path(profiles).exists():
            learnt = load_profiles(profiles)
            self._scheduler.start_from({name: learnt[name]} if name in learnt else {})

    @contextmanager
    def refusing(self, name: str) -> Iterator[None]:
        """Around what ends the requests of a model, so that there are no further ones.

        Raises:
            ModelNotServedError: a model that is not served, or that is being unloaded already.
        """
        if name not in self._models or name in self._refused:
            known = ", ".join(self._models.keys() - self._refused) or "none"
            raise ModelNotServedError(f"model={name!r} is not served, or is being unloaded; those served are: {known}")
        self._refused.add(name)
        try:
            yield
        finally:
            self._refused.discard(name)

    def remove(self, name: str) -> None:
        """Serves a model no longer, of which no request is unfinished."""
        with self._recovery.changing():
            self._operations.apply(self._kv.take_operations())  # while it is known how long its pages are
            served = self._models.pop(name)
            self.num_compilations += served.runner.num_compilations
            self._kv.unregister(name)
            self._scheduler.remove_model(name)
            self._operations.forget(name)
        del served
        self._reader.submit(_let_go)

    # -- checks --------------------------------------------------------------------------------------------------

    def _check_can_add(self, name: str) -> None:
        if name in self._models:
            raise ConfigError(f"a model called {name!r} is served already; unload it, or choose another name")
        if self._config.slab_policy != "elastic":
            raise ConfigError(
                f"slab_policy={self._config.slab_policy!r} divides the memory for the models that are there at the "
                "start; use slab_policy='elastic' to load others later"
            )
        if self._config.record is not None:
            raise ConfigError(
                f"record={str(self._config.record)!r} names at its beginning all that takes memory; leave record out "
                "to load models later"
            )

    def _known(
        self, name: str, model: LoadedModel, settings: ModelSettings
    ) -> tuple[KnownModel, dict[tuple[str, str], PageClass]]:
        """The model with its page classes, checked with the books of an empty arena beside these."""
        self._arena.group.check(model.config, model.weights)
        tpu = get_backend(self._operations.implementation).tile_units
        unit_words, allocator = self._geometry.unit_words, self._kv.pool.allocator
        geometry = geometry_in_units(
            name, model.config.of_shard(self._arena.group.size), self._config.page_size, unit_words, tpu=tpu
        )
        own = settings.over(self._config)
        max_seq_len = max_seq_len_of(name, model, own)
        classes = classes_of(name, model, geometry, self._config, max_seq_len)
        longest = max((group for one in classes.values() for group in one.groups), key=lambda one: one.page_units)
        if longest.page_units > allocator.slab_units:
            unit_bytes = unit_words * WORD_BYTES
            raise ConfigError(
                f"a page of {longest} takes {longest.page_units} units of {unit_bytes} bytes, and a slab has "
                f"{allocator.slab_units} since the start; give the engine this model at the start, or fewer kv_formats"
            )
        trial = KVManager(allocator.emptied(), dict(self._kv.classes) | classes)
        check_one_request_fits(trial, name, own, max_seq_len, allocator.num_units * allocator.unit_bytes)
        if self._config.quotas:
            QuotaAccount(trial, self._config.quotas)
        return KnownModel(name, model, own, own.served_formats, geometry, max_seq_len), classes


def _check_room(name: str, model: LoadedModel, group: DeviceGroup) -> None:
    """Raises `ConfigError` if the devices have less memory left than the weights take. CPUs share one memory."""
    leaves = jax.tree.leaves(abstract_params(model.config, model.weights))
    size, device = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves), group.devices[0]
    part, free = size // (1 if device.platform == "cpu" else group.size), min(map(free_memory_bytes, group.devices))
    if part > free:
        raise ConfigError(
            f"the {model.weights} weights of {name!r} take {format_bytes(part)} of {device}, which has "
            f"{format_bytes(free)} left; unload another model before, or give narrower weights"
        )


def _let_go() -> None:
    """Parts of a model name each other, so that Python frees it when it looks for such, which can be hours away."""
    gc.collect()
    give_back_freed_memory()
