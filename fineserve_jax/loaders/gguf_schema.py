"""Metadata of a GGUF file: types and ranges of those that are used, and which others change nothing."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from fineserve_jax.loaders.hf_schema import Count, ExpertCount, Layers, NormEpsilon, Positions, PositiveNumber, RopeBase
from fineserve_jax.loaders.known_keys import CheckedKeys

Heads = Annotated[int, Field(ge=1, le=2**16)]
HeadSize = Annotated[int, Field(ge=2, le=2**16)]
Factor = Annotated[float, Field(ge=0, le=1e12)]  # 0 is written for none


class GGUFModelKeys(CheckedKeys):
    """Keys under the architecture's name, without that prefix; None where a key is absent."""

    vocab_size: Count | None = None
    context_length: Positions | None = None
    embedding_length: Count | None = None
    block_count: Layers | None = None
    feed_forward_length: Count | None = None
    heads: Heads | None = Field(None, alias="attention.head_count")
    kv_heads: Heads | None = Field(None, alias="attention.head_count_kv")
    key_length: HeadSize | None = Field(None, alias="attention.key_length")
    value_length: HeadSize | None = Field(None, alias="attention.value_length")
    norm_eps: NormEpsilon | None = Field(None, alias="attention.layer_norm_rms_epsilon")
    layer_norm_eps: Factor | None = Field(None, alias="attention.layer_norm_epsilon")
    scale: Factor | None = Field(None, alias="attention.scale")
    window: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, alias="attention.sliding_window")
    window_pattern: Annotated[int, Field(ge=0, le=4096)] | Annotated[list[bool], Field(max_length=4096)] | None = Field(
        None, alias="attention.sliding_window_pattern"
    )
    attention_cap: Factor | None = Field(None, alias="attn_logit_softcapping")
    logit_cap: Factor | None = Field(None, alias="final_logit_softcapping")
    rotated: HeadSize | None = Field(None, alias="rope.dimension_count")
    freq_base: RopeBase | None = Field(None, alias="rope.freq_base")
    local_freq_base: RopeBase | None = Field(None, alias="rope.freq_base_swa")
    scale_linear: Factor | None = Field(None, alias="rope.scale_linear")
    scaling_type: str | None = Field(None, alias="rope.scaling.type")
    scaling_factor: Factor | None = Field(None, alias="rope.scaling.factor")
    original_context: Positions | None = Field(None, alias="rope.scaling.original_context_length")
    attn_factor: PositiveNumber | None = Field(None, alias="rope.scaling.attn_factor")
    beta_fast: PositiveNumber | None = Field(None, alias="rope.scaling.yarn_beta_fast")
    beta_slow: PositiveNumber | None = Field(None, alias="rope.scaling.yarn_beta_slow")
    embedding_scale: Factor | None = None
    residual_scale: Factor | None = None
    logit_scale: Factor | None = None
    pooling_type: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    expert_count: ExpertCount | None = None
    expert_used_count: ExpertCount | None = None
    expert_feed_forward_length: Count | None = None


class GGUFGeneralKeys(CheckedKeys):
    """Keys that every architecture shares."""

    architecture: str | None = Field(None, alias="general.architecture")


class GGUFSplitKeys(CheckedKeys):
    """Of a model in several files: which part this is, from 0; how many there are; how many tensors all have."""

    number: Annotated[int, Field(ge=0, le=2**16 - 1)] | None = Field(None, alias="split.no")
    count: Annotated[int, Field(ge=0, le=2**16 - 1)] | None = Field(None, alias="split.count")
    tensors: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = Field(None, alias="split.tensors.count")


HARMLESS_KEYS = frozenset(("rope.scaling.finetuned", "tensor_data_layout"))
# The values at which a key changes nothing in the supported families.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.layer_norm_epsilon": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.shared_kv_layers": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_gating_func": (0, 1, 3),  # a softmax, over all experts' logits or those of the chosen
    "expert_shared_count": (0,),
    "expert_used_count": (0,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0, 1),
    "final_logit_softcapping": (0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0, 1),
    "nextn_predict_layers": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.yarn_attn_factor": (1,),
    "rope.scaling.yarn_ext_factor": (-1, 1),
    "rope.scaling.yarn_log_multiplier": (0,),
    "use_parallel_residual": (False,),
}


TokenId = Annotated[int, Field(ge=0, le=2**32 - 1)]


class GGUFTokenizerKeys(CheckedKeys):
    """Keys of the tokenizer; None where a key is absent. Ids are unsigned: one beyond the vocabulary means none."""

    kind: str | None = Field(None, alias="tokenizer.ggml.model")
    pre: str | None = Field(None, alias="tokenizer.ggml.pre")
    tokens: list[str] | None = Field(None, alias="tokenizer.ggml.tokens")
    token_type: list[int] | None = Field(None, alias="tokenizer.ggml.token_type")
    scores: list[float] | None = Field(None, alias="tokenizer.ggml.scores")
    merges: list[str] | None = Field(None, alias="tokenizer.ggml.merges")
    bos: TokenId | None = Field(None, alias="tokenizer.ggml.bos_token_id")
    eos: TokenId | None = Field(None, alias="tokenizer.ggml.eos_token_id")
    eot: TokenId | None = Field(None, alias="tokenizer.ggml.eot_token_id")
    eom: TokenId | None = Field(None, alias="tokenizer.ggml.eom_token_id")
    unknown: TokenId | None = Field(None, alias="tokenizer.ggml.unknown_token_id")
    padding: TokenId | None = Field(None, alias="tokenizer.ggml.padding_token_id")
    add_bos: bool | None = Field(None, alias="tokenizer.ggml.add_bos_token")
    add_eos: bool | None = Field(None, alias="tokenizer.ggml.add_eos_token")
    add_space_prefix: bool | None = Field(None, alias="tokenizer.ggml.add_space_prefix")
    chat_template: str | None = Field(None, alias="tokenizer.chat_template")
