"""Configurations in the forms in which publishers write them: older names of keys, and further ones."""

from typing import Any

import pytest

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.models import ModelConfig

TRAINING = {"attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "torch_dtype": "bfloat16"}
PUBLISHED: dict[str, dict[str, Any]] = {
    "Granite": {
        "attention_bias": False,
        "attention_multiplier": 0.0078125,
        "embedding_multiplier": 12.0,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 12800,
        "logits_scaling": 16.0,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 32,
        "num_hidden_layers": 40,
        "num_key_value_heads": 8,
        "residual_multiplier": 0.22,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "vocab_size": 49155,
    },
    "Phi3": {
        "attention_bias": False,
        "embd_pdrop": 0.0,
        "full_attn_mod": 1,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "interpolate_factor": 1,
        "lm_head_bias": False,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "num_attention_heads": 24,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"long_factor": [1 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"},
        "rope_theta": 10000.0,
        "sliding_window": 262144,
        "tie_word_embeddings": True,
        "vocab_size": 200064,
    },
    "Olmo3": {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
        "max_position_embeddings": 65536,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "attention_factor": 1.2079441541679836,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 8.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "yarn",
        },
        "rope_theta": 500000,
        "sliding_window": 4096,
        "tie_word_embeddings": False,
        "vocab_size": 100278,
    },
    "SmolLM3": {
        "attention_bias": False,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "layer_types": ["full_attention"] * 36,
        "max_position_embeddings": 65536,
        "max_window_layers": 28,
        "mlp_bias": False,
        "no_rope_layer_interval": 4,
        "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16,
        "num_hidden_layers": 36,
        "num_key_value_heads": 4,
        "pretraining_tp": 2,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 5000000.0,
        "sliding_window": None,
        "use_sliding_window": False,
        "vocab_size": 128256,
    },
    "Cohere2": {
        "attention_bias": False,
        "cache_implementation": "hybrid",
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "layer_norm_eps": 1e-05,
        "layer_switch": 4,
        "logit_scale": 0.25,
        "max_position_embeddings": 132096,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "order_of_interleaved_layers": "local_attn_first",
        "position_embedding_type": "rope_gptj",
        "rope_scaling": None,
        "rope_theta": 50000,
        "rotary_pct": 1.0,
        "sliding_window": 4096,
        "sliding_window_pattern": 4,
        "use_embedding_sharing": True,
        "use_gated_activation": True,
        "use_parallel_block": True,
        "use_parallel_embedding": True,
        "vocab_size": 256000,
    },
    "Mixtral": {
        "hidden_act": "silu",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_attention_heads": 32,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": 32000,
    },
    "Qwen3Moe": {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "max_window_layers": 48,
        "mlp_only_layers": [],
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "GptOss": {
        "attention_bias": True,
        "experts_per_token": 4,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 2880,
        "initial_context_length": 4096,
        "intermediate_size": 2880,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "max_position_embeddings": 131072,
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": 24,
        "num_key_value_heads": 8,
        "num_local_experts": 32,
        "output_router_logits": False,
        "quantization_config": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 4096,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "router_aux_loss_coef": 0.9,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 201088,
    },
}


def read(name: str, **changes: Any) -> ModelConfig:
    return hf_config({"architectures": [f"{name}ForCausalLM"], **TRAINING, **PUBLISHED[name], **changes})


def test_multipliers_and_parts_of_heads():
    granite, phi = read("Granite"), read("Phi3")
    assert (granite.logit_multiplier, granite.attention_scale) == (1 / 16, 0.0078125)
    assert (phi.head_dim, phi.rotated, phi.long_after) == (128, 96, 4096)
    assert phi.rope_scaling is not None
    assert phi.rope_scaling.factor == 32.0


def test_layers_that_differ():
    olmo, smol, cohere, oss = (read(name) for name in ("Olmo3", "SmolLM3", "Cohere2", "GptOss"))
    assert (olmo.full_attention_layers, olmo.local_rope_theta) == (tuple(range(3, 32, 4)), 500000)
    assert (smol.no_rope_layers, smol.sliding_window) == (tuple(range(3, 36, 4)), None)
    assert cohere.no_rope_layers == cohere.full_attention_layers == tuple(range(3, 32, 4))
    assert (oss.full_attention_layers, oss.sliding_window) == (tuple(range(1, 24, 2)), 128)
    assert oss.rope_scaling is not None
    assert not oss.rope_scaling.truncate


def test_experts():
    mixtral, qwen, oss = (read(name).experts for name in ("Mixtral", "Qwen3Moe", "GptOss"))
    assert mixtral is not None
    assert qwen is not None
    assert oss is not None
    assert (mixtral.count, mixtral.used, mixtral.intermediate_size) == (8, 2, 14336)
    assert (qwen.count, qwen.used, qwen.intermediate_size, qwen.normalised) == (128, 8, 768, True)
    assert (oss.count, oss.used, oss.router_bias) == (32, 4, True)


@pytest.mark.parametrize(
    ("name", "changes", "complaint"),
    [
        ("Cohere2", {"use_parallel_block": False}, "use_parallel_block = False"),
        ("Cohere2", {"layer_switch": 3}, "layer_switch is 3, and sliding_window_pattern 4"),
        ("GptOss", {"experts_per_token": 5}, "experts_per_token = 5"),
        ("SmolLM3", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 36 layers"),
        ("Qwen3Moe", {"shared_expert_intermediate_size": 512}, "shared_expert_intermediate_size = 512"),
        ("Mixtral", {"num_local_experts": 1}, "cannot use 2 of 1 experts"),
        ("Phi3", {"partial_rotary_factor": 0.5}, "48 RoPE factors for 64 rotated values"),
        ("Granite", {"partial_rotary_factor": 0.5}, "only 1 in models of the family granite"),
    ],
)
def test_what_would_change_numbers_is_refused_by_name(name, changes, complaint):
    with pytest.raises(ModelLoadError, match=complaint):
        read(name, **changes)
