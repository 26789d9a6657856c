"""Keys of a Hugging Face config.json: types and ranges of those that are used, and which others change nothing."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from fineserve_jax.loaders.known_keys import CheckedKeys

Count = Annotated[int, Field(ge=1, le=2**24)]
Layers = Annotated[int, Field(ge=1, le=4096)]
Positions = Annotated[int, Field(ge=1, le=2**31 - 1)]
PositiveNumber = Annotated[float, Field(gt=0, le=1e12)]
SoftCap = Annotated[float, Field(ge=0, le=1e12)]  # 0 is written for none
RopeBase = Annotated[float, Field(gt=1, le=1e15)]
NormEpsilon = Annotated[float, Field(gt=0, lt=1)]
ExpertCount = Annotated[int, Field(ge=0, le=1024)]
RopeFactors = Annotated[list[PositiveNumber], Field(max_length=2**15)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class HFConfigKeys(CheckedKeys):
    """config.json of one of the supported families; None where a key is absent."""

    architectures: list[str] | None = None
    vocab_size: Count | None = None
    hidden_size: Count | None = None
    intermediate_size: Count | None = None
    num_hidden_layers: Layers | None = None
    num_attention_heads: Annotated[int, Field(ge=1, le=2**16)] | None = None
    num_key_value_heads: Annotated[int, Field(ge=1, le=2**16)] | None = None
    head_dim: Annotated[int, Field(ge=2, le=2**16)] | None = None
    max_position_embeddings: Positions | None = None
    original_max_position_embeddings: Positions | None = None
    rms_norm_eps: NormEpsilon | None = None
    hidden_act: str | None = None
    hidden_activation: str | None = None
    query_pre_attn_scalar: PositiveNumber | None = None
    attn_logit_softcapping: SoftCap | None = None
    final_logit_softcapping: SoftCap | None = None
    use_bidirectional_attention: bool | None = None
    tie_word_embeddings: bool | None = None
    attention_bias: bool | None = None
    mlp_bias: bool | None = None
    rope_theta: RopeBase | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    rope_local_base_freq: RopeBase | None = None
    partial_rotary_factor: PositiveNumber | None = None
    sliding_window_pattern: Annotated[int, Field(ge=1, le=4096)] | None = None
    sliding_window: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    use_sliding_window: bool | None = None
    max_window_layers: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    layer_types: Annotated[list[str], Field(max_length=4096)] | None = None
    quantization_config: dict[str, Any] | None = None
    compression_config: dict[str, Any] | None = None
    embedding_multiplier: PositiveNumber | None = None
    attention_multiplier: PositiveNumber | None = None
    residual_multiplier: PositiveNumber | None = None
    logits_scaling: PositiveNumber | None = None
    num_experts: ExpertCount | None = None
    num_local_experts: ExpertCount | None = None
    num_experts_per_tok: ExpertCount | None = None
    moe_intermediate_size: Count | None = None
    norm_topk_prob: bool | None = None
    decoder_sparse_step: Layers | None = None
    no_rope_layers: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(max_length=4096)] | None = None
    no_rope_layer_interval: Layers | None = None
    layer_norm_eps: NormEpsilon | None = None
    logit_scale: PositiveNumber | None = None
    layer_switch: Layers | None = None
    swiglu_limit: PositiveNumber | None = None
    swiglu_alpha: PositiveNumber | None = None
    mlp_only_layers: Annotated[list[Annotated[int, Field(ge=0, lt=4096)]], Field(max_length=4096)] | None = None


class HFRopeKeys(CheckedKeys):
    """`rope_parameters` (newer) or `rope_scaling` (older) of config.json."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: RopeBase | None = None
    partial_rotary_factor: PositiveNumber | None = None
    factor: PositiveNumber | None = None
    original_max_position_embeddings: Positions | None = None
    low_freq_factor: PositiveNumber | None = None
    high_freq_factor: PositiveNumber | None = None
    beta_fast: PositiveNumber | None = None
    beta_slow: PositiveNumber | None = None
    attention_factor: PositiveNumber | None = None
    mscale: Annotated[float, Field(ge=0, le=1e6)] | None = None
    mscale_all_dim: Annotated[float, Field(ge=0, le=1e6)] | None = None
    truncate: bool | None = None
    short_factor: RopeFactors | None = None
    long_factor: RopeFactors | None = None


class HFLocalRopeKeys(CheckedKeys):
    """The part of `rope_parameters` that is for layers with a window; it is not scaled."""

    rope_theta: RopeBase | None = None
    rope_type: Literal["default"] | None = None


class HFTokenIds(CheckedKeys):
    """Ends of sequences in config.json and generation_config.json."""

    eos_token_id: TokenId | list[TokenId] | None = None


class AddedTokenKeys(CheckedKeys):
    """A token with its matching rules."""

    content: str
    special: bool = False
    normalized: bool = False
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class NamedTemplate(CheckedKeys):
    """One of several chat templates."""

    name: str
    template: str


class NamedTokenKeys(CheckedKeys):
    """special_tokens_map.json: named tokens, as texts or with their matching rules."""

    bos_token: str | AddedTokenKeys | None = None
    eos_token: str | AddedTokenKeys | None = None
    unk_token: str | AddedTokenKeys | None = None
    pad_token: str | AddedTokenKeys | None = None
    sep_token: str | AddedTokenKeys | None = None
    cls_token: str | AddedTokenKeys | None = None
    mask_token: str | AddedTokenKeys | None = None
    additional_special_tokens: list[str | AddedTokenKeys] | None = None
    extra_special_tokens: dict[str, str | AddedTokenKeys] | list[str | AddedTokenKeys] | None = None

    def texts(self) -> dict[str, str]:
        """The named tokens that are stated."""
        stated = {name: getattr(self, name) for name in NamedTokenKeys.model_fields if name.endswith("_token")}
        return {name: entry if isinstance(entry, str) else entry.content for name, entry in stated.items() if entry}

    def special(self) -> list[AddedTokenKeys]:
        """All tokens that are stated here, which are special, with their matching rules."""
        further = self.extra_special_tokens or []
        named = [getattr(self, name) for name in NamedTokenKeys.model_fields if name.endswith("_token")]
        named += [
            *(self.additional_special_tokens or []),
            *(further if isinstance(further, list) else further.values()),
        ]
        return [AddedTokenKeys(content=entry) if isinstance(entry, str) else entry for entry in named if entry]


class HFTokenizerKeys(NamedTokenKeys):
    """tokenizer_config.json."""

    chat_template: str | list[NamedTemplate] | None = None
    added_tokens_decoder: dict[str, AddedTokenKeys] | None = None
    add_eos_token: bool | None = None  # which tokenizer.json says, too
    fineserve_duplicate_tokens: dict[str, TokenId] | None = None  # written by `convert`


class AddedTokensFile(CheckedKeys):
    """added_tokens.json: ids by text."""

    tokens: dict[str, TokenId]


class HFIndex(CheckedKeys):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]

    @field_validator("weight_map")
    @classmethod
    def _files_of_this_directory(cls, value: dict[str, str]) -> dict[str, str]:
        for name in value.values():
            if not name or "/" in name or "\\" in name or name in (".", "..") or "\0" in name:
                raise ValueError("every tensor's file must be a plain name in the checkpoint's directory")
        return value


# Keys that describe, or that only training, sampling, heads of other tasks or the host's execution read.
_HARMLESS = """
    _attn_implementation _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path
    _sliding_window_pattern
    add_cross_attention architectures attention_dropout attn_implementation auto_map bad_words_ids
    begin_suppress_tokens bos_token_id chunk_size_feed_forward classifier_dropout cache_implementation custom_pipelines
    decoder_start_token_id diversity_penalty do_sample dtype early_stopping embd_pdrop
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task
    forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label ignore_index
    initializer_range is_encoder_decoder is_llama_config keys_to_ignore_at_inference label2id length_penalty
    max_length max_new_tokens max_sequence_length min_length mlp_dropout model_max_length model_type
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp
    problem_type pruned_heads remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate router_aux_loss_coef router_jitter_noise sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tokenizer_class top_k top_p torch_dtype torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
HARMLESS_KEYS = frozenset(_HARMLESS.split())
# The values at which a key changes nothing in the supported families.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (1.0,),
    "attn_logit_softcapping": (0,),
    "embedding_multiplier": (1.0,),
    "final_logit_softcapping": (0,),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "is_causal": (True,),
    "is_decoder": (True, False),  # a decoder-only model is one either way
    "lm_head_bias": (False,),
    "logit_scale": (1.0,),
    "logits_scaling": (1.0,),
    "mlp_bias": (False,),
    "moe_layers": (0,),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "qkv_bias": (False,),
    "residual_multiplier": (1.0,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_bias": (False,),
    "use_bidirectional_attention": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
