"""What placement is asked: a YAML file such as

devices: [h100, h100]
models:
  - model: llama-3.1-8b@awq
    kv_precision: int4
    rate: 12             # requests a second
    prompt_tokens: 400   # means
    output_tokens: 250
    ttft_slo_s: 1.0
    tpot_slo_s: 0.05
    tp: [1, 2]           # degrees of tensor parallelism to consider
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import yaml
from pydantic import Field

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler.devices import DeviceSpec, get_device
from fineserve_jax.sim.models import ModelVariant, get_cache, parse_model
from fineserve_jax.validation import Validated


class ModelLoad(Validated):
    """A model, its formats, and who wants what of it.

    Attributes:
        model: shape and weights, as `llama-3.1-8b@awq`.
        source: what a plan is to load for it: an alias or a path; None: what the shape is called.
        kv_precision: KV format of its requests.
        rate: requests a second.
        prompt_tokens, output_tokens: mean lengths.
        ttft_slo_s, tpot_slo_s: targets.
        tp: degrees of tensor parallelism to consider.
    """

    model: str
    source: str | None = None
    kv_precision: str = "bf16"
    rate: float = Field(gt=0, allow_inf_nan=False)
    prompt_tokens: float = Field(default=500, gt=0, allow_inf_nan=False)
    output_tokens: float = Field(default=250, gt=0, allow_inf_nan=False)
    ttft_slo_s: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    tpot_slo_s: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    tp: tuple[int, ...] = (1,)

    def variant(self, tp: int) -> ModelVariant:
        return parse_model(self.model, tp)

    @property
    def urgency(self) -> float:
        """Rate over target, as Prism weighs models."""
        return self.rate / self.tpot_slo_s


@dataclass(frozen=True)
class Problem:
    """Models, and devices that are numbered in this order; `reserve` is the share of memory kept for activations."""

    models: tuple[ModelLoad, ...]
    devices: tuple[DeviceSpec, ...]
    reserve: float = 0.1


@dataclass(frozen=True)
class Replica:
    """A copy of a model: `models[model]` on `devices`, as many as its degree of tensor parallelism."""

    model: int
    devices: tuple[int, ...]


Placement: TypeAlias = tuple[Replica, ...]
"""All replicas; requests of a model are divided equally among its own."""


def read_problem(path: str | Path) -> Problem:
    """The problem in a YAML file.

    Raises:
        ConfigError: a file that cannot be read, or a value in it that makes no sense.
    """
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the workload {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    return parse_problem(values, str(path))


def parse_problem(values: Any, where: str) -> Problem:
    """The problem in a mapping with `devices` and `models`."""
    if not isinstance(values, dict) or not values.get("devices") or not values.get("models"):
        raise ConfigError(f"{where} must hold a list of `devices` and a list of `models`")
    if unknown := sorted(set(values) - {"devices", "models", "reserve"}):
        raise ConfigError(f"{where} sets {', '.join(unknown)}; it may set devices, models and reserve")
    if not all(isinstance(model, dict) for model in values["models"]):
        raise ConfigError(f"each of the models in {where} must be a mapping with `model` and `rate`")
    devices = tuple(get_device(str(name)) for name in values["devices"])
    models = tuple(ModelLoad(**model) for model in values["models"])
    reserve = values.get("reserve", 0.1)
    if not isinstance(reserve, (int, float)) or not 0 <= reserve < 1:
        raise ConfigError(f"reserve={reserve!r} in {where}; give a share of the memory, from 0 to under 1")
    for load in models:
        get_cache(load.kv_precision)
        for tp in load.tp:
            load.variant(tp)
            if not 1 <= tp <= len(devices):
                raise ConfigError(
                    f"tp={tp} of {load.model}: {where} has {len(devices)} devices; use 1 to {len(devices)}"
                )
    return Problem(models, devices, float(reserve))
