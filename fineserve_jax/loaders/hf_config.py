"""The model configuration that a Hugging Face config.json describes; every key is used, known harmless, or refused."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.embedding_models import refuse_other_tasks
from fineserve_jax.loaders.hf_multimodal import text_part
from fineserve_jax.loaders.hf_schema import (
    HARMLESS_KEYS,
    NEUTRAL_VALUES,
    HFConfigKeys,
    HFLocalRopeKeys,
    HFRopeKeys,
)
from fineserve_jax.loaders.known_keys import KeyReader, check_keys, shown
from fineserve_jax.loaders.quantization import quantization_method
from fineserve_jax.models.family import Family
from fineserve_jax.models.layer_types import FULL, SLIDING
from fineserve_jax.models.model_config import Activation, ModelConfig
from fineserve_jax.models.registry import family_of_hf_architecture
from fineserve_jax.models.rope_scaling import RopeScaling

_WHERE = "config.json: "
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Of these a null says that there is none; elsewhere it means the default.
_NULL_MEANS_NONE = ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping")


def hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The configuration a parsed config.json describes.

    Raises ModelLoadError for an architecture that is not supported, a key that is missing, of another type or out of
    range, and a key that nothing here reads and that is not known to be harmless.
    """
    raw = text_part(raw)
    checked = check_keys(HFConfigKeys, raw, _WHERE).model_dump()
    architecture = (checked.pop("architectures") or ["(none stated)"])[0]
    refuse_other_tasks(architecture)
    family = family_of_hf_architecture(architecture)
    stated = {key: value for key, value in checked.items() if value is not None}
    if family.local_rope:
        stated = _with_plain_rope(stated)
    nulls = {key: None for key in _NULL_MEANS_NONE if key in raw and raw[key] is None}
    defaults = {k: v for k, v in family.hf_defaults.items() if k != "rope_parameters" or "rope_scaling" not in stated}
    reader = KeyReader({**defaults, **stated, **nulls}, _WHERE)
    _refuse_unsupported(reader)
    try:
        config = _model_config(family, reader)
    except KeyError as error:
        raise ModelLoadError(f"config.json has no {error.args[0]!r}, which {architecture} needs") from error
    reader.refuse_unread(HARMLESS_KEYS, _neutral_values(config) | dict(family.hf_neutral))
    return config


def _model_config(family: Family, keys: KeyReader) -> ModelConfig:
    heads, hidden = keys["num_attention_heads"], keys["hidden_size"]
    head_dim = keys.get("head_dim", hidden // heads)
    theta, scaling, partial = _rope(keys, family)
    fields: dict[str, Any] = {
        "family": family.name,
        "vocab_size": keys["vocab_size"],
        "hidden_size": hidden,
        "num_layers": keys["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": keys.get("num_key_value_heads", heads),
        "head_dim": head_dim,
        "rotary_dim": None if partial == 1.0 else int(head_dim * partial),
        "intermediate_size": keys["intermediate_size"],
        "activation": _activation(keys),
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": keys.get("rms_norm_eps", 1e-6),
        "tie_embeddings": keys.get("tie_word_embeddings", False),
        "max_position": keys["max_position_embeddings"],
    }
    return ModelConfig(**{**fields, **family.traits(keys)})


def _neutral_values(config: ModelConfig) -> dict[str, tuple[Any, ...]]:
    """What else changes nothing beside what `config` holds already."""
    return {
        **NEUTRAL_VALUES,
        "layer_types": ([FULL] * config.num_layers,),
        "query_pre_attn_scalar": (config.head_dim,),
        "rotary_dim": (config.rotated,),
        "num_kv_heads": (config.num_kv_heads,),
        "rope_ratio": (1.0,),
        "experts_per_token": (config.experts.used,) if config.experts else (),
        "initial_context_length": (config.rope_scaling.original_max_position,) if config.rope_scaling else (),
    }


def _refuse_unsupported(keys: KeyReader) -> None:
    """Features that have a clearer word than that their key is unknown."""
    for stated in ("quantization_config", "compression_config"):
        quantization_method(keys.get(stated))


def _activation(keys: KeyReader) -> Activation:
    """Stated under one name or, as in Gemma, another."""
    stated = [keys[key] for key in ("hidden_activation", "hidden_act") if keys.get(key) is not None] or ["silu"]
    for activation in stated:
        if activation not in _ACTIVATIONS:
            supported = ", ".join(_ACTIVATIONS)
            raise ModelLoadError(f"config.json: hidden_act {activation!a} is not supported; supported: {supported}")
    if _ACTIVATIONS[stated[0]] != _ACTIVATIONS[stated[-1]]:
        raise ModelLoadError(
            f"config.json has hidden_activation {stated[0]!a} and hidden_act {stated[-1]!a}; keep the one the model "
            "was trained with"
        )
    return _ACTIVATIONS[stated[0]]


def _with_plain_rope(stated: dict[str, Any]) -> dict[str, Any]:
    """`rope_parameters` with a part for each type of layer as the older keys say it."""
    rope = stated.get("rope_parameters", {})
    parts = {kind: rope.get(kind) for kind in (FULL, SLIDING)}
    if not any(isinstance(part, dict) for part in parts.values()):
        return stated
    if others := sorted(set(rope) - set(parts)):
        raise ModelLoadError(f"config.json: rope_parameters.{others[0]} = {shown(rope[others[0]])} is of no layer type")
    where = f"{_WHERE}rope_parameters.{SLIDING}."
    local = KeyReader(check_keys(HFLocalRopeKeys, parts[SLIDING] or {}, where).model_dump(exclude_none=True), where)
    base, _ = {"rope_local_base_freq": local.get("rope_theta")}, local.get("rope_type")
    local.refuse_unread((), {})
    return {**stated, "rope_parameters": parts[FULL] or {}, **{k: v for k, v in base.items() if v is not None}}


def _rope(keys: KeyReader, family: Family) -> tuple[float, RopeScaling | None, float]:
    """Base, scaling and the part of a head that is turned, from the newer form (`rope_parameters`) or the older
    (`rope_theta` and `rope_scaling`)."""
    newer, older = keys.get("rope_parameters"), keys.get("rope_scaling")
    if newer and older and newer != older:
        raise ModelLoadError(
            "config.json has both rope_parameters and rope_scaling, and they differ; keep the one the model "
            "was trained with"
        )
    where = f"{_WHERE}{'rope_parameters' if newer else 'rope_scaling'}."
    checked = check_keys(HFRopeKeys, newer or older or {}, where).model_dump(exclude_none=True)
    for key in ("rope_theta", "partial_rotary_factor"):
        if (beside := keys.get(key)) is not None:
            checked.setdefault(key, beside)
    if (original := keys.get("original_max_position_embeddings")) is not None:
        checked["original_max_position_embeddings"] = original  # stated beside the table it has precedence
    rope = KeyReader(checked, where)
    partial = rope.get("partial_rotary_factor", 1.0)
    if not (partial == 1.0 or (family.partial_rotary and partial < 1.0)):
        allowed = "at most 1" if family.partial_rotary else f"only 1 in models of the family {family.name}"
        raise ModelLoadError(f"config.json: partial_rotary_factor {partial} is not supported, {allowed}")
    theta = rope.get("rope_theta", 10000.0)
    scaling = _rope_scaling(rope, keys["max_position_embeddings"])
    rope.refuse_unread((), _ROPE_NEUTRAL)
    return theta, scaling, partial


# Left over from another kind of scaling, or written by rule.
_ROPE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "factor": (1.0,),
    "attention_factor": (1.0,),
    "mrope_interleaved": (False,),
    "finetuned": (True, False),
}


def _rope_scaling(rope: KeyReader, max_position: int) -> RopeScaling | None:
    kind, older_kind = rope.get("rope_type"), rope.get("type")
    kind = kind or older_kind or "default"
    original = rope.get("original_max_position_embeddings", max_position)
    try:
        if kind == "default":
            return None
        if kind == "linear":
            return RopeScaling("linear", rope["factor"], original)
        if kind == "llama3":
            return RopeScaling("llama3", rope["factor"], original, rope["low_freq_factor"], rope["high_freq_factor"])
        if kind in ("longrope", "su") or (kind == "yarn" and "short_factor" in rope):  # names of older files
            return _longrope(rope, original, max_position)
        if kind == "yarn":
            return _yarn(rope, original, max_position)
    except KeyError as error:
        raise ModelLoadError(f"config.json: RoPE scaling {kind!a} has no {error.args[0]!r}, which it needs") from error
    raise ModelLoadError(
        f"config.json: RoPE scaling {kind!a} is not supported; supported: linear, llama3, yarn, longrope"
    )


def _longrope(rope: KeyReader, original: int, max_position: int) -> RopeScaling:
    short, long = rope["short_factor"], rope["long_factor"]
    return RopeScaling(
        "longrope",
        rope.get("factor", max_position / original),
        original,
        attention_factor=rope.get("attention_factor"),
        factors=tuple(short),
        long_factors=tuple(long),
    )


def _yarn(rope: KeyReader, original: int, max_position: int) -> RopeScaling:
    factor = rope.get("factor", max_position / original)
    return RopeScaling(
        "yarn",
        factor,
        original,
        beta_fast=rope.get("beta_fast", 32.0),
        beta_slow=rope.get("beta_slow", 1.0),
        attention_factor=_attention_factor(rope, factor),
        truncate=rope.get("truncate", True),
    )


def _attention_factor(rope: KeyReader, factor: float) -> float | None:
    """yarn's multiplier of cos and sin; None leaves the derived one. Two temperatures divide each other."""
    stated, over, under = (rope.get(key) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None or not (over and under):
        return stated
    if factor <= 1.0:
        return 1.0
    return (0.1 * over * math.log(factor) + 1.0) / (0.1 * under * math.log(factor) + 1.0)
