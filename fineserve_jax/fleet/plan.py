"""A plan: what each engine serves, on which devices, out of how much memory. A YAML file such as

version: 1
models:
  chat: {model: qwen3-8b.gguf, weights: int8}
  code: smollm2-135m
settings: {max_seq_len: 4096}        # of all engines
engines:
  - devices: [0]
    models: [chat, code]
    settings: {kv_memory: 30GB}      # of this one
    shares: {chat: 0.6, code: 0.4}   # of its KV memory, guaranteed; what is not used is lent
  - devices: [1]
    models: [chat]                   # a replica
  - {devices: [2, 3], models: [code]}  # two devices for each step: tensor parallelism

`fineserve-jax place` writes one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, field_validator, model_validator

from fineserve_jax.engine.engine_config import EngineConfig, read_settings
from fineserve_jax.engine.model_settings import ModelSource, model_sources
from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.quotas import Quota
from fineserve_jax.validation import Validated

OF_THE_PLAN = ("tensor_parallel", "record", "step_profile")
"""Settings that an engine of several has from its place in the plan, or that name a file which only one can have."""


class EnginePlan(Validated):
    """An engine.

    Attributes:
        devices: numbers of JAX's devices; several compute each step together.
        models: what it serves, by the names of the plan.
        settings: fields of `EngineConfig` in which it differs from the others.
        shares: of its KV memory, guaranteed to models of its own.
    """

    devices: tuple[int, ...] = Field(min_length=1)
    models: tuple[str, ...] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    shares: dict[str, float] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        for what, listed in (("devices", self.devices), ("models", self.models)):
            if len(set(listed)) < len(listed):
                raise ValueError(f"{what}={list(listed)} names one twice; name each once")
        if min(self.devices) < 0:
            raise ValueError(f"devices={list(self.devices)}: devices are numbered from 0 on")
        if others := [name for name in self.shares if name not in self.models]:
            raise ValueError(
                f"there is a share for {others[0]!r}, which the engine does not serve; it serves {self.models}"
            )
        return self


class Plan(Validated):
    """Engines, and the models that they serve.

    Attributes:
        version: of the file's form.
        models: by the names that requests use, as `LLM` takes them.
        settings: fields of `EngineConfig` of all engines.
        engines: one at least; those that serve the same model are its replicas.
    """

    version: Literal[1]
    models: dict[str, ModelSource] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)
    engines: tuple[EnginePlan, ...] = Field(min_length=1)

    @field_validator("models", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> Any:
        return model_sources(value)

    @model_validator(mode="after")
    def _makes_sense(self) -> Self:
        served = {name for engine in self.engines for name in engine.models}
        if unknown := sorted(served - self.models.keys()):
            raise ValueError(f"an engine serves {unknown[0]!r}, which is not among models: {', '.join(self.models)}")
        if idle := [name for name in self.models if name not in served]:
            raise ValueError(f"no engine serves {idle[0]!r}; give it one, or leave the model out")
        for number, engine in enumerate(self.engines):
            for name, source in self.sources_of(engine).items():
                try:
                    source.over(self.config_of(engine))
                except ConfigError as error:
                    raise ValueError(f"engine {number}, model {name!r}: {error}") from None
        return self

    @property
    def named(self) -> dict[str, EnginePlan]:
        """The engines by their names: engine-0, engine-1 and so on."""
        return {f"engine-{number}": engine for number, engine in enumerate(self.engines)}

    def sources_of(self, engine: EnginePlan) -> dict[str, ModelSource]:
        """The models of an engine."""
        return {name: self.models[name] for name in engine.models}

    def config_of(self, engine: EnginePlan) -> EngineConfig:
        """The settings of an engine. Raises `ConfigError` for those that cannot be."""
        given = {**self.settings, **engine.settings}
        if taken := [name for name in OF_THE_PLAN if name in given]:
            raise ConfigError(f"{taken[0]} is no setting of an engine in a plan; leave it out")
        shares = {f"model:{name}": Quota(guaranteed=share) for name, share in engine.shares.items()}
        quotas = given.pop("quotas", {})
        if shares or quotas:
            given["quotas"] = {**quotas, **shares}
        if len(engine.devices) > 1:
            given["tensor_parallel"] = len(engine.devices)
        return EngineConfig(**given)

    def with_quotas(self, quotas: Mapping[str, Quota]) -> "Plan":
        """The same with further quotas in each engine. Raises `ConfigError` for one that there is already."""
        own = self.settings.get("quotas", {})
        if twice := own.keys() & quotas.keys():
            raise ConfigError(f"{min(twice)!r} has a quota in the plan and in the classes; leave one out")
        settings = {**self.settings, "quotas": {**own, **quotas}} if quotas else self.settings
        return Plan(**{**dict(self), "settings": settings})

    def to_yaml(self) -> str:
        """The plan as `read_plan` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_none=True), sort_keys=False)


def read_plan(path: str | Path) -> Plan:
    """The plan in a file. Raises `ConfigError` for one that cannot be read, or that holds anything else."""
    try:
        return Plan(**{str(key): value for key, value in read_settings(path).items()})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
