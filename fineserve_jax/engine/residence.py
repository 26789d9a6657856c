"""What an engine keeps on its device, weights and KV arena: replaced, given back, and taken again."""

from collections.abc import Mapping

import jax

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.engine.new_weights import WeightSource, new_params
from fineserve_jax.engine.recovery import Recovery
from fineserve_jax.errors import EngineError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.loaders import LoadedModel
from fineserve_jax.runner.arena import Arena


class Residence:
    """The device memory of an engine. Its methods are for when no request is unfinished.

    Args:
        models, arena, kv, recovery: of the engine.

    Attributes:
        is_asleep: whether the memory is given back.
    """

    def __init__(self, models: Mapping[str, ServedModel], arena: Arena, kv: KVManager, recovery: Recovery) -> None:
        self._models, self._arena, self._kv, self._recovery = models, arena, kv, recovery
        self.is_asleep = False

    def update_params(self, served: ServedModel, source: WeightSource) -> None:
        """Gives a model new weights of the same shapes, in the formats of those it has; nothing is compiled for it.

        The old ones are dropped when the new ones are complete: an update that fails changes nothing. Until then both
        take memory, unless `sleep` has dropped the old ones. What the prefix cache holds is forgotten. Models that
        share their weights, and the `LoadedModel` that the engine was made of, have the new ones, too.

        Args:
            source: see `WeightSource`; matrices are encoded on the way. Arrays are copied.

        Raises:
            ModelLoadError, ConfigError: see `new_params`.
        """
        new = new_params(served.model, source, self._arena.group)
        self._forget_cached()
        served.model.params.update(new)  # at once, as far as other Python code can tell

    def sleep(self, drop_weights: bool) -> None:
        """Gives the memory of keys and values back, and that of weights on an accelerator; a CPU's weights stay where
        they are. Meanwhile requests are refused. What the prefix cache holds is forgotten.

        Args:
            drop_weights: drop them instead of keeping them in host memory, since `update_params` will give others.
        """
        self._forget_cached()
        self.is_asleep = True
        self._arena.release()
        for model in self._distinct():
            if drop_weights:
                model.params.clear()
            elif jax.default_backend() != "cpu":
                model.params.update(jax.device_get(model.params))

    def wake_up(self) -> None:
        """Takes the memory again that `sleep` gave back, if it did.

        Raises:
            EngineError: the weights were dropped, and none were given since.
        """
        if not self.is_asleep:
            return
        if lacking := [name for name, served in self._models.items() if not served.model.params]:
            raise EngineError(
                f"the weights of {lacking[0]!r} were dropped; give others by update_params before wake_up"
            )
        for model in self._distinct():
            model.params.update(jax.device_put(model.params, self._arena.group.shardings(model.config, model.params)))
        self._arena.renew()
        self.is_asleep = False

    def check_awake(self) -> None:
        """Raises `EngineError` for who wants something computed meanwhile."""
        if self.is_asleep:
            raise EngineError("the engine is asleep; wake_up gives it its memory back")

    def _distinct(self) -> list[LoadedModel]:
        """The models, of those that share their weights one."""
        return list({id(served.model.params): served.model for served in self._models.values()}.values())

    def _forget_cached(self) -> None:
        if not self.is_asleep:
            with self._recovery.changing():
                self._kv.forget_cached()
