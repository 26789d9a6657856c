"""The options that commands share, taken from the settings classes, and a YAML file's part in them.

`fineserve-jax` gives each field of `EngineConfig` and `SamplingParams` a flag of the same name, with its
docstring as help. A flag that is given beats the file named by `--config`, which beats the default.
"""

import inspect
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    NotRequired,
    TypeAlias,
    TypedDict,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import tyro
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fineserve_jax.engine.engine_config import EngineConfig, read_settings
from fineserve_jax.engine.model_settings import ModelSource
from fineserve_jax.entrypoints.cli.model_flags import DEFAULT_MODEL, choose_model, choose_models, models_of_file
from fineserve_jax.errors import ConfigError
from fineserve_jax.request.sampling_params import SamplingParams

MODEL_KEYS = ("model", "models")
NO_FLAG = ("seed", "structured_outputs", "logits_processors")
"""Fields of `SamplingParams` that are none. The flag `seed` is the engine's, from which those of requests are drawn;
tables of tables are for a YAML file."""
NOT_STREAMED = ("n", "logprobs", "logprob_token_ids", "prompt_logprobs")
"""Fields of `SamplingParams` that do not concern `generate`: it streams one answer, as text."""

ModelFlag = Annotated[str | None, tyro.conf.arg(help_behavior_hint=f"(default: {DEFAULT_MODEL})")]
ModelFlags = Annotated[
    tuple[str, ...],
    tyro.conf.UseAppendAction,
    tyro.conf.arg(help_behavior_hint=f"(repeatable; default: {DEFAULT_MODEL})"),
]
ConfigFlag = Annotated[Path | None, tyro.conf.arg(help_behavior_hint="")]


def fields_of(settings: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of `settings`, its own before those it inherits."""
    fields = settings.model_fields
    own = [name for name in inspect.get_annotations(settings) if name in fields]
    return {name: fields[name] for name in (*own, *fields)}


def flags_of(settings: type[BaseModel], leave_out: Iterable[str] = ()) -> Any:
    """A TypedDict with a flag for each field of `settings`; tyro gives it the flags that were given only."""
    hints = get_type_hints(settings)
    fields = {
        name: _flag_type(hints[name], field.get_default(call_default_factory=True))
        for name, field in fields_of(settings).items()
        if name not in leave_out
    }
    # A type checker wants literal fields here; these are known at run time only.
    flags: Any = TypedDict(settings.__name__, fields)  # type: ignore[misc]
    flags.__doc__ = _described(settings)
    return flags


def _described(settings: type[BaseModel]) -> str:
    """The docstring of `settings`, with what those of its bases say of the fields that it inherits."""
    bases = [base for base in settings.__mro__ if issubclass(base, BaseModel)]
    parts = [inspect.cleandoc(base.__doc__ or "").partition("\n\nAttributes:\n") for base in bases]
    attributes = [described.partition("\n\n")[0] for _, _, described in parts if described]
    return "\n".join([parts[0][0], "", "Attributes:", *attributes])


def _flag_type(hint: Any, default: Any) -> Any:
    """The type of a flag. None is had by not giving it; lists and tables are made by repeating it."""
    if get_origin(hint) in (Union, types.UnionType):
        hint = Union[tuple(kind for kind in get_args(hint) if kind is not types.NoneType)]  # noqa: UP007
    shown = "" if default in (None, (), {}) else f"(default: {default})"
    if get_origin(hint) is dict:
        hint = tuple[tuple[get_args(hint)], ...]  # type: ignore[misc]
    if get_origin(hint) is tuple:
        repeated = tyro.conf.arg(default=(), help_behavior_hint="(repeatable)")
        return Annotated[hint, tyro.conf.UseAppendAction, repeated]
    return NotRequired[Annotated[hint, tyro.conf.arg(help_behavior_hint=shown)]]


if TYPE_CHECKING:
    EngineFlags: TypeAlias = Mapping[str, Any]
    SamplingFlags: TypeAlias = Mapping[str, Any]
    GenerateFlags: TypeAlias = Mapping[str, Any]
    PerplexityFlags: TypeAlias = Mapping[str, Any]
    BenchFlags: TypeAlias = Mapping[str, Any]
    QualityFlags: TypeAlias = Mapping[str, Any]
else:
    # Quotas are tables of tables, which a YAML file holds well and a flag does not.
    EngineFlags = flags_of(EngineConfig, leave_out=["quotas"])
    SamplingFlags = flags_of(SamplingParams, leave_out=NO_FLAG)
    GenerateFlags = flags_of(SamplingParams, leave_out=[*NO_FLAG, *NOT_STREAMED])
    # One window at a time is scored, in memory of its own, and nothing is sampled.
    ONE_AT_A_TIME = [
        "prefix_cache",
        "min_kv_precision",
        "preemption",
        "swap_memory",
        "policy",
        "ageing_s",
        "slo_aware",
        "overtaking_limit_s",
        "narrow_keep_pages",
        "growth_reserve_pages",
        "num_speculative_tokens",
        "quotas",
        "record",
        "record_every",
        "check_every",
    ]
    # Cases name the precisions, and what is computed once must be computed again in the next round.
    BenchFlags = flags_of(EngineConfig, leave_out=["kv_precision", "prefix_cache", "quotas", "record", "record_every"])
    PerplexityFlags = flags_of(EngineConfig, leave_out=["max_batch_size", "max_seq_len", "seed", *ONE_AT_A_TIME])
    # The formats that are served are those that are measured.
    OF_FORMATS = ["kv_precision", "kv_formats", "max_batch_size", "max_seq_len", "seed"]
    QualityFlags = flags_of(EngineConfig, leave_out=[*OF_FORMATS, *ONE_AT_A_TIME])


@dataclass(frozen=True)
class Settings:
    """What a command works with.

    Attributes:
        model: alias or path of the only model; empty if there are names.
        models: by name, with what is special about each; empty for a model without a name.
        engine: fields of `EngineConfig` that the file or a flag sets.
        sampling: fields of `SamplingParams` that the file or a flag sets, checked.
    """

    model: str
    models: dict[str, ModelSource]
    engine: dict[str, Any]
    sampling: dict[str, Any]

    def config(self, **overrides: Any) -> EngineConfig:
        """The engine's settings. Raises `ConfigError`."""
        return EngineConfig(**{**self.engine, **overrides})


def settle(
    config: Path | None,
    model: str | Sequence[str] | None,
    engine: Mapping[str, Any],
    sampling: Mapping[str, Any] | None = None,
) -> Settings:
    """Puts a YAML file and flags together.

    Args:
        config: the file, if any. It may hold `model` or `models` and the fields of both settings classes; a
            command takes from it what concerns it.
        model: the flag; a sequence of them from a command that takes several models. What is said of a model with a
            name beats what is said of the engine; a model without a name is special in nothing.
        engine, sampling: flags, as tyro returns them for `flags_of`.

    Raises:
        ConfigError: an unreadable file, a key that nothing is called, or a bad setting of the engine.
        RequestError: a bad sampling value.
    """
    from_file = {} if config is None else _known_settings(config)
    in_file = models_of_file(config, from_file)
    chosen = choose_model(model, in_file) if model is None or isinstance(model, str) else choose_models(model, in_file)
    single = chosen if isinstance(chosen, ModelSource) else None
    in_model = {} if single is None else single.model_dump(exclude={"model"}, exclude_none=True)
    in_engine = {name: value for name, value in from_file.items() if name in EngineConfig.model_fields}
    not_sampling = {*MODEL_KEYS, *EngineConfig.model_fields}
    in_sampling = {name: value for name, value in from_file.items() if name not in not_sampling}
    settings = Settings(
        model="" if single is None else single.model,
        models=chosen if isinstance(chosen, dict) else {},
        engine=in_engine | in_model | _given(EngineConfig, engine),
        sampling=in_sampling | _given(SamplingParams, sampling or {}),
    )
    settings.config()
    SamplingParams(**settings.sampling)
    return settings


def _known_settings(path: Path) -> dict[str, Any]:
    settings = read_settings(path)
    known = [*MODEL_KEYS, *fields_of(EngineConfig), *fields_of(SamplingParams)]
    if unknown := [str(key) for key in settings if key not in known]:
        raise ConfigError(f"{path} sets {', '.join(map(repr, unknown))}; it may set: {', '.join(dict.fromkeys(known))}")
    return settings


def _given(settings: type[BaseModel], flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given: one that can be repeated and was not is empty. Pairs become tables again."""
    hints = get_type_hints(settings)
    given = {name: value for name, value in flags.items() if value != ()}
    return {name: dict(value) if _is_table(hints[name]) else value for name, value in given.items()}


def _is_table(hint: Any) -> bool:
    return any(get_origin(kind) is dict for kind in (hint, *get_args(hint)))
