"""From a placement to a plan that engines can be made of."""

from typing import Any

from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.errors import ConfigError
from fineserve_jax.fleet import EnginePlan, Plan
from fineserve_jax.sim.placement import Estimate, ModelLoad, Placement, Problem

ENGINE_WEIGHTS = {"bf16": "bf16", "int8": "int8", "awq": "int4", "qoq": "int4"}
"""The engine's weights for those of the simulator's models; 4-bit checkpoints are read into its own format."""


def plan_of(problem: Problem, placement: Placement, expected: Estimate) -> Plan:
    """The plan of a placement: replicas that share their devices are one engine.

    An engine's KV memory is the estimate's for its devices, or a part of it where engines share a device, and each of
    its models is guaranteed what the estimate expects it to need.

    Raises:
        ConfigError: weights that no engine has.
    """
    names = [_name(problem, number) for number in range(len(problem.models))]
    groups: dict[tuple[int, ...], list[int]] = {}
    for replica in placement:
        groups.setdefault(replica.devices, []).append(replica.model)
    engines = tuple(_engine(devices, models, names, expected) for devices, models in sorted(groups.items()))
    sources = {name: _source(load) for name, load in zip(names, problem.models, strict=True)}
    return Plan(version=1, models=sources, engines=engines)


def _engine(devices: tuple[int, ...], models: list[int], names: list[str], expected: Estimate) -> EnginePlan:
    """An engine of these models on these devices; its share of each is the least, as all have pages of the same."""
    parts = {model: min(expected.arena_shares[device][model] for device in devices) for model in models}
    own = sum(parts.values())
    kv_bytes = min(expected.arena_bytes[device] for device in devices) * own
    shares = {names[model]: _rounded_down(part / own) for model, part in parts.items()} if len(models) > 1 else {}
    return EnginePlan(
        devices=devices,
        models=tuple(names[model] for model in models),
        settings={"kv_memory": int(kv_bytes)},
        shares=shares,
    )


def _rounded_down(share: float) -> float:
    """To a hundredth, so that shares add up to 1 at most."""
    return int(100 * share) / 100


def _name(problem: Problem, number: int) -> str:
    """What requests call a model: its own name, with its place in the file where others have the same."""
    load = problem.models[number]
    is_only = sum(other.model == load.model for other in problem.models) == 1
    return load.model if is_only else f"{load.model}/{number}"


def _source(load: ModelLoad) -> ModelSource:
    shape, _, weights = load.model.partition("@")
    weights = weights or "bf16"
    if weights not in ENGINE_WEIGHTS:
        known = ", ".join(ENGINE_WEIGHTS)
        raise ConfigError(f"weights {weights!r} of {load.model} are the simulator's alone; a plan may have {known}")
    fields: dict[str, Any] = {"weights": ENGINE_WEIGHTS[weights], "kv_precision": load.kv_precision}
    return ModelSource(model=load.source or shape, **fields)
