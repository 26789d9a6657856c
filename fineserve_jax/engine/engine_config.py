"""What a user may set of an engine, in Python, on the command line and in YAML files alike."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator

from fineserve_jax.engine.recipes import check_recipe
from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.quotas import check_quotas
from fineserve_jax.pallas_kernels.formats import FORMATS, get_format
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

Weights = Literal["fp32", "bf16", "int8", "int4"]


AUTO = "auto"
"""KV precision of requests that are kept as wide as 16 bits while there is room, and narrowed when there is not."""


class EngineConfig(SchedulerConfig):
    """Settings of an engine, its scheduler's too. Each is honoured or refused with a `ConfigError`; none is ignored.

    Attributes:
        weights: precision of the weights: fp32, bf16, int8 (8-bit activations too) or int4 (weights only). None:
            bf16, or what a converted checkpoint holds.
        kv_recipes: name -> recipe, a further KV precision that keeps some layers in another format than the rest, such
            as "int4, first 2 and last 2 layers bf16". Requests may name it.
        kv_precision: KV format of requests that do not name one; or "auto": bf16 while there is room.
        kv_formats: KV formats that requests may name, int3 and pairs such as k8v4 too; None: all that are registered,
            which these are not. Baseline slab policies divide memory by this list.
        kv_memory: size of the KV arena: bytes, a string such as "256MiB", or a fraction of the device's memory such
            as 0.25. None: half of an accelerator's free memory, 512MiB on a CPU. With `tensor_parallel` on each device.
        tensor_parallel: how many devices compute each step together, each with a part of the weights and of the KV
            heads: they have to divide the model's query heads, MLP and experts evenly, and its KV heads either way.
        max_seq_len: most tokens of a request, prompt and output. None: 2048, or the model's limit if that is less.
        slab_policy: "elastic" moves slabs between precisions; "partitioned" fixes each one's share, without quotas;
            "uniform" gives every page the length of the widest.
        slab_shares: with "partitioned", KV format -> share of the memory; equal if None.
        prefix_cache: "exact" lets requests of one KV format that begin alike share pages; "convert" also serves a
            request from pages in a wider format, requantized, so that its tokens depend on what was cached; "off"
            shares nothing but what samples of one prompt find computed.
        min_kv_precision: KV format to which older tokens of requests may be narrowed when memory is short, for those
            that do not name one; None: not narrowed. With kv_precision="auto" the narrowest there is.
        swap_memory: host memory for preempted requests, as kv_memory is given, or 0; None: as much as kv_memory, but
            at most a quarter of the host's.
        step_profile: file that learnt step times are kept in: read at the start if it is there, and written whenever
            the engine has nothing left to do.
        num_speculative_tokens: most tokens that a decode may be ahead in a step. They are looked up in the request's
            own text, computed where that pays, and kept if they are what is sampled, so that answers are the same as
            without. At most page_size - 1; 0: none.
        async_scheduling: plan and call a step while the device computes the one before, where it can be told what it
            computes; the tokens are the same.
        seed: of requests that name none.
        record: file to record to how the memory is used, for `fineserve-jax slabs`; None: not recorded.
        record_every: steps from one entry of the record to the next.
        check_finite: find the layer whose output is the first to hold NaN or infinity, when a request ends because of
            such; costs a little time in every step.
        check_every: audit the books of the KV memory after every so many steps; 0: only when nothing is left to do.
    """

    weights: Weights | None = None
    kv_recipes: dict[str, str] = Field(default_factory=dict)
    kv_precision: str = "bf16"
    kv_formats: tuple[str, ...] | None = None
    kv_memory: int | float | str | None = None
    tensor_parallel: int = Field(default=1, ge=1, le=1024)
    max_batch_size: int = Field(default=32, ge=1, le=1024)
    max_seq_len: int | None = Field(default=None, ge=2)
    page_size: Literal[16, 32, 64, 128] = 16
    slab_policy: Literal["elastic", "partitioned", "uniform"] = "elastic"
    slab_shares: dict[str, float] | None = None
    prefix_cache: Literal["exact", "convert", "off"] = "exact"
    min_kv_precision: str | None = None
    swap_memory: int | float | str | None = None
    step_profile: str | None = None
    num_speculative_tokens: int = Field(default=0, ge=0)
    async_scheduling: bool = True
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    record: Path | None = None
    record_every: int = Field(default=10, ge=1)
    check_finite: bool = False
    check_every: int = Field(default=0, ge=0)

    @field_validator("kv_recipes")
    @classmethod
    def _recipes(cls, value: dict[str, str]) -> dict[str, str]:
        for name, text in value.items():
            check_recipe(name, text)
        return value

    @field_validator("kv_precision", "min_kv_precision")
    @classmethod
    def _known_precision(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or value in info.data.get("kv_recipes", {}):
            return value
        return value if value == AUTO and info.field_name == "kv_precision" else get_format(value).name

    @field_validator("kv_formats")
    @classmethod
    def _known_formats(cls, value: tuple[str, ...] | None, info: ValidationInfo) -> tuple[str, ...] | None:
        if value is None:
            return None
        recipes = info.data.get("kv_recipes", {})
        return tuple(dict.fromkeys(name if name in recipes else get_format(name).name for name in value))

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for name in ("kv_precision", "min_kv_precision"):
            value = getattr(self, name)
            if self.kv_formats is not None and value not in (*self.served_formats, AUTO, None):
                raise ValueError(f"{name}={value!r} is not among kv_formats={list(self.kv_formats)}; add it there")
        if self.slab_shares is not None and self.slab_policy != "partitioned":
            raise ValueError(
                f"slab_shares has no meaning with slab_policy={self.slab_policy!r}; use slab_policy='partitioned'"
            )
        if self.narrows and self.slab_policy != "elastic":
            raise ValueError(
                f"kv_precision='auto' and min_kv_precision have no meaning with slab_policy={self.slab_policy!r}: "
                "narrower pages would free no memory for others; use slab_policy='elastic', or a fixed precision"
            )
        if self.reproducible and self.narrows:
            raise ValueError(
                "reproducible with kv_precision='auto' or min_kv_precision: what is narrowed, and so what is said, "
                "depends on how much memory is free; use a fixed kv_precision, and no min_kv_precision"
            )
        if self.reproducible and self.prefix_cache == "convert":
            raise ValueError(
                "reproducible with prefix_cache='convert': tokens depend on what was cached; use 'exact' or 'off'"
            )
        if self.num_speculative_tokens >= self.page_size:
            raise ValueError(
                f"num_speculative_tokens={self.num_speculative_tokens}: drafts lie in one KV page, which has page_size="
                f"{self.page_size} tokens; use at most {self.page_size - 1}"
            )
        if self.reproducible and self.num_speculative_tokens:
            raise ValueError(
                f"reproducible with num_speculative_tokens={self.num_speculative_tokens}: how sums are taken would "
                "depend on what is guessed; leave num_speculative_tokens out"
            )
        if self.reproducible and self.tensor_parallel > 1:
            raise ValueError(
                f"reproducible with tensor_parallel={self.tensor_parallel}: in what order devices' sums are added up "
                "may depend on where a row stands; leave one of them out"
            )
        if self.preemption == "recompute" and self.swap_memory not in (None, 0, "0"):
            raise ValueError(f"swap_memory={self.swap_memory!r} is not used with preemption='recompute'; leave it out")
        if self.preemption == "swap" and self.swap_memory in (0, "0"):
            raise ValueError("preemption='swap' needs host memory; give swap_memory, or use preemption='recompute'")
        if self.quotas and self.slab_policy == "partitioned":
            raise ValueError("quotas have no meaning with slab_policy='partitioned', which divides memory for good")
        check_quotas(self.quotas, self.served_formats)
        return self

    @property
    def narrows(self) -> bool:
        """Whether requests that say nothing else may be narrowed."""
        return self.kv_precision == AUTO or self.min_kv_precision is not None

    @property
    def served_formats(self) -> tuple[str, ...]:
        """KV formats and recipes that requests may name."""
        if self.kv_formats is not None:
            return tuple(dict.fromkeys((*self.kv_formats, *self.kv_recipes)))
        named = (name for name in (self.kv_precision, self.min_kv_precision) if name not in (AUTO, None))
        return tuple(dict.fromkeys((*FORMATS, *(name for name in named if name is not None), *self.kv_recipes)))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings in a YAML file, unchecked.

    Raises:
        ConfigError: a file that cannot be read, or that holds no mapping.
    """
    try:
        settings = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration {path}: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(settings, dict):
        raise ConfigError(f"{path} must hold settings such as `kv_precision: int8`, one a line")
    return settings
