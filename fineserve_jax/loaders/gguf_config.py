"""The model configuration that a GGUF file describes; every key of the architecture is used, harmless, or refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.loaders.gguf_schema import HARMLESS_KEYS, NEUTRAL_VALUES, GGUFGeneralKeys, GGUFModelKeys
from fineserve_jax.loaders.known_keys import KeyReader, check_keys, shown
from fineserve_jax.models.family import Family
from fineserve_jax.models.layer_types import pattern_types, window_traits
from fineserve_jax.models.model_config import ExpertsConfig, ModelConfig
from fineserve_jax.models.registry import family_of_gguf_architecture
from fineserve_jax.models.rope import yarn_attention_factor
from fineserve_jax.models.rope_scaling import RopeScaling

_NORM_EPSILON = {"rms": "attention.layer_norm_rms_epsilon", "layer": "attention.layer_norm_epsilon"}
ROPE_FACTORS = "rope_freqs.weight"
SHORT_ROPE_FACTORS, LONG_ROPE_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model configuration a GGUF file describes.

    Raises ModelLoadError for an architecture that is not supported, metadata that are missing, of another type or out
    of range, and a key of the architecture that nothing here reads and that is not known to be harmless.
    """
    general = check_keys(GGUFGeneralKeys, file.metadata, f"{file.path}: ")
    architecture = general.architecture
    if architecture is None:
        raise _missing(file, "general.architecture")
    family = family_of_gguf_architecture(architecture)
    prefix = f"{architecture}."
    own = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    where = f"{file.path}: {prefix}"
    checked = check_keys(GGUFModelKeys, own, where).model_dump(by_alias=True, exclude_none=True)
    decimals = {key: _decimal(value) for key, value in checked.items()}
    keys = KeyReader({**family.gguf_defaults, **decimals}, where)
    try:
        config = _model_config(file, family, keys)
    except KeyError as error:
        raise _missing(file, prefix + error.args[0]) from error
    keys.refuse_unread(HARMLESS_KEYS, NEUTRAL_VALUES)
    return config


def _model_config(file: GGUFFile, family: Family, keys: KeyReader) -> ModelConfig:
    if pooling := keys.get("pooling_type", 0):
        raise ModelLoadError(
            f"{file.path} is an embedding model (pooling_type {pooling}): it makes vectors of texts, and cannot write "
            "text; use a language model, or, for vectors, the Hugging Face directory that the file was made from"
        )
    hidden, heads = keys["embedding_length"], keys["attention.head_count"]
    head_dim = keys.get("attention.key_length", hidden // heads)
    context = keys["context_length"]
    fields: dict[str, Any] = dict(
        family=family.name,
        vocab_size=_vocab_size(file, keys),
        hidden_size=hidden,
        num_layers=keys["block_count"],
        num_heads=heads,
        num_kv_heads=keys.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        rotary_dim=_rotary_dim(keys, family, head_dim),
        intermediate_size=keys["feed_forward_length"],
        rope_theta=keys.get("rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(file, family, keys, context),
        norm_eps=keys[_NORM_EPSILON[family.gguf_traits.get("norm", "rms")]],
        tie_embeddings="output.weight" not in file.tensors,
        max_position=context,
        experts=_experts(file, keys),
        **_biases(file),
        **_windows(keys, keys["block_count"], context),
    )
    config = ModelConfig(**{**fields, **family.gguf_keys(keys), **family.gguf_traits})
    _refuse_other_heads(keys, config)
    return config


def _decimal(value: Any) -> Any:
    """Numbers are stored as f32: gives back the decimal that one was written from."""
    return float(np.format_float_scientific(np.float32(value), unique=True)) if isinstance(value, float) else value


def _missing(file: GGUFFile, key: str) -> ModelLoadError:
    return ModelLoadError(f"{file.path} has no metadata {key!r}; it is not a complete language model")


def _vocab_size(file: GGUFFile, keys: KeyReader) -> int:
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelLoadError(f"{file.path} has no tensor 'token_embd.weight'; the file is incomplete")
    rows, stated = embedding.shape[0], keys.get("vocab_size")
    if stated not in (None, rows):
        raise ModelLoadError(
            f"{file.path}: vocab_size is {stated}, but token_embd.weight has {rows} rows; the file is damaged"
        )
    return rows


def _biases(file: GGUFFile) -> dict[str, bool]:
    """Which groups of projections carry biases: those of which any layer has one."""
    kinds = _kinds(file)
    mlp = {f"ffn_{part}{stacked}.bias" for part in ("gate", "up", "down") for stacked in ("", "_exps")}
    return {
        "qkv_bias": not kinds.isdisjoint({"attn_q.bias", "attn_k.bias", "attn_v.bias", "attn_qkv.bias"}),
        "o_bias": "attn_output.bias" in kinds,
        "mlp_bias": not kinds.isdisjoint(mlp),
    }


def _kinds(file: GGUFFile) -> set[str]:
    """The tensors that layers have, without the layers' prefixes."""
    return {name.split(".", 2)[2] for name in file.tensors if name.startswith("blk.") and name.count(".") >= 3}


def _experts(file: GGUFFile, keys: KeyReader) -> ExpertsConfig | None:
    """The mixture of experts; all layers have it. As llama.cpp has it, a token's experts' weights add up to 1."""
    if not (count := keys.get("expert_count", 0)):
        return None
    return ExpertsConfig(
        count,
        keys["expert_used_count"],
        keys.get("expert_feed_forward_length", keys["feed_forward_length"]),
        router_bias="ffn_gate_inp.bias" in _kinds(file),
    )


def _rotary_dim(keys: KeyReader, family: Family, head_dim: int) -> int | None:
    """How many values of a head are turned; None: all."""
    rotated = keys.get("rope.dimension_count")
    if rotated in (None, head_dim):
        return None
    if not (family.partial_rotary and rotated < head_dim):
        raise ModelLoadError(
            f"the file rotates {rotated} of {head_dim} values of a head (partial RoPE), which is not supported in "
            f"models of the family {family.name}"
        )
    return int(rotated)


def _refuse_other_heads(keys: KeyReader, config: ModelConfig) -> None:
    values = keys.get("attention.value_length")
    if values not in (None, config.head_dim):
        raise ModelLoadError(
            f"the file has keys of {config.head_dim} and values of {values} numbers a head, which is not supported"
        )
    scale = keys.get("attention.scale", 0.0)
    if scale and not math.isclose(scale, config.attention_scale, rel_tol=1e-6):
        raise ModelLoadError(
            f"the file's attention.scale is {scale}, which is not supported in models of the family {config.family}; "
            f"only 1 / sqrt(head size) is, {config.attention_scale}"
        )


def _windows(keys: KeyReader, num_layers: int, context: int) -> dict[str, Any]:
    """Which layers have a window: those that a list says, or all but every n-th."""
    window = keys.get("attention.sliding_window", 0) or None  # 0 is written for none
    pattern = keys.get("attention.sliding_window_pattern")
    if window is None or (pattern is None and window >= context):
        return {"sliding_window": None}
    if pattern is None:
        raise ModelLoadError(
            f"the file's attention.sliding_window is {window}, without attention.sliding_window_pattern, which says "
            "what layers have the window; such files are not supported"
        )
    return window_traits(pattern_types(num_layers, pattern), num_layers, window)


def _rope_scaling(file: GGUFFile, family: Family, keys: KeyReader, context: int) -> RopeScaling | None:
    if LONG_ROPE_FACTORS in file.tensors and SHORT_ROPE_FACTORS in file.tensors:
        return _longrope(file, keys, context)
    stated = _stated_scaling(file, keys, context)
    if stated is not None and stated.kind == "yarn":
        stated = dataclasses.replace(stated, truncate=family.yarn_truncates)
    if ROPE_FACTORS not in file.tensors:
        return stated
    if stated is not None:
        raise ModelLoadError(
            f"{file.path} has {ROPE_FACTORS} and RoPE scaling {stated.kind!r} besides, which is not supported"
        )
    return RopeScaling("factors", factors=_factors(file, ROPE_FACTORS))


def _longrope(file: GGUFFile, keys: KeyReader, context: int) -> RopeScaling:
    """Factors for sequences within and beyond the original context. The converter has worked out attn_factor."""
    original = keys.get("rope.scaling.original_context_length", context)
    kind, factor = keys.get("rope.scaling.type", "longrope"), keys.get("rope.scaling.factor", 0.0)
    if kind not in ("longrope", "none"):
        raise ModelLoadError(
            f"{file.path} has {LONG_ROPE_FACTORS} and RoPE scaling {shown(kind)} besides, which is not supported"
        )
    return RopeScaling(
        "longrope",
        factor or context / original,
        original,
        attention_factor=keys.get("rope.scaling.attn_factor", 1.0),
        factors=_factors(file, SHORT_ROPE_FACTORS),
        long_factors=_factors(file, LONG_ROPE_FACTORS),
    )


def _factors(file: GGUFFile, name: str) -> tuple[float, ...]:
    shape = file.tensors[name].shape
    if math.prod(shape) > 2**16:
        raise ModelLoadError(f"{file.path}: {name} has shape {list(shape)}, far more than a head's pairs")
    return tuple(float(f) for f in file.read(name).ravel())


def _stated_scaling(file: GGUFFile, keys: KeyReader, context: int) -> RopeScaling | None:
    """As llama.cpp reads it: the kind is linear unless stated, and a factor of 0 means none."""
    get: dict[str, Any] = {key: keys.get(f"rope.scaling.{key}") for key in ("type", "factor", "attn_factor")}
    old_factor = keys.get("rope.scale_linear")
    original = keys.get("rope.scaling.original_context_length", context)
    fast, slow = (keys.get(f"rope.scaling.yarn_beta_{end}") for end in ("fast", "slow"))
    kind = "linear" if get["type"] is None else get["type"]
    factor = (old_factor if get["factor"] is None else get["factor"]) or 1.0
    multiplier = get["attn_factor"] or 1.0
    if kind != "yarn" and multiplier != 1.0:
        raise ModelLoadError(
            f"{file.path}: rope.scaling.attn_factor is {multiplier} with RoPE scaling {shown(kind)}; it is supported "
            "with yarn only"
        )
    if kind == "yarn" and (factor != 1.0 or multiplier != 1.0):
        # The file's attn_factor multiplies yarn's own temperature.
        attention = None if multiplier == 1.0 else multiplier * yarn_attention_factor(factor)
        return RopeScaling(
            "yarn", factor, original, beta_fast=fast or 32.0, beta_slow=slow or 1.0, attention_factor=attention
        )
    if kind == "none" or factor == 1.0:
        return None
    if kind != "linear":
        raise ModelLoadError(f"{file.path}: RoPE scaling {kind!a} is not supported; supported: none, linear, yarn")
    return RopeScaling("linear", factor, original)
