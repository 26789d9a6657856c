"""From a plan to engines on the devices that it names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from fineserve_jax.engine.engine import Engine
from fineserve_jax.engine.intake import Intake
from fineserve_jax.engine.load import load_engine, load_from
from fineserve_jax.engine.loop import EngineLoop
from fineserve_jax.engine.ticket_loop import TicketLoop
from fineserve_jax.errors import ConfigError, EngineError
from fineserve_jax.fleet.fleet import Fleet
from fineserve_jax.fleet.plan import Plan, read_plan
from fineserve_jax.loaders import LoadedModel, load_model
from fineserve_jax.loaders.load import resolve_source
from fineserve_jax.runner.mesh import DeviceGroup


def load_fleet(plan: Plan) -> Fleet:
    """Loads the models of a plan, and makes its engines, called as in `Plan.named`.

    Raises:
        ModelLoadError: a model that cannot be found, read or used.
        ConfigError: devices that there are not, or settings that cannot be honoured.
    """
    devices = jax.devices()
    for number, engine in enumerate(plan.engines):
        if missing := [device for device in engine.devices if device >= len(devices)]:
            raise ConfigError(
                f"engine {number} of the plan is on device {missing[0]}, and there are {len(devices)}, numbered from 0 "
                "on; change its devices"
            )
    engines, weights = {}, SharedWeights()
    for name, engine in plan.named.items():
        own = [devices[device] for device in engine.devices]
        loaded = load_engine(plan.sources_of(engine), plan.config_of(engine), own, weights.load)
        engines[name] = EngineLoop(loaded)
    return Fleet(engines)


class SharedWeights:
    """Loads models, and those that engines on the same devices have in common once."""

    def __init__(self) -> None:
        self._loaded: dict[tuple[Path, str | None, DeviceGroup], LoadedModel] = {}

    def load(self, source: str | Path, weights: str | None, placement: DeviceGroup) -> LoadedModel:
        """See `load_model`. The arrays are shared, and not what holds them: `update_params` of one engine gives it
        others, and leaves those of the others in use."""
        key = resolve_source(source), weights, placement
        if key not in self._loaded:
            self._loaded[key] = load_model(source, weights, placement)
        return dataclasses.replace(self._loaded[key], params=dict(self._loaded[key].params))


def open_engines(
    model: str | None,
    models: Mapping[str, Any] | None,
    plan: str | Path | Plan | Fleet | None,
    settings: Mapping[str, Any],
) -> tuple[Intake, TicketLoop]:
    """What a front door asks, and what serves it: an engine, or those of a plan, which may run already.

    Raises:
        ModelLoadError, ConfigError: see `load_from` and `load_fleet`; or a plan beside what it says itself.
    """
    if plan is None:
        engine = load_from(model, models, settings)
        return engine, EngineLoop(engine)
    if model is not None or models is not None or settings:
        given = ["model"] * (model is not None) + ["models"] * (models is not None) + list(settings)
        raise ConfigError(f"{', '.join(given)} beside a plan, which says that itself; change the plan")
    if not isinstance(plan, Fleet):
        plan = load_fleet(plan if isinstance(plan, Plan) else read_plan(plan))
    return plan, plan


def only_engine(intake: Intake) -> Engine:
    """The engine that is asked. Raises `EngineError` if there are several."""
    if isinstance(intake, Engine):
        return intake
    raise EngineError("these are several engines, by a plan, and `engine` is one; use what the LLM itself offers")
