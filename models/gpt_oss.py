"""gpt-oss: experts with biases and clamped gates; attention with sinks, and a window in every other layer."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import FULL, SLIDING, window_traits
from fineserve_jax.models.model_config import ExpertsConfig
from fineserve_jax.models.tensor_layout import Joined, TensorLayout

GATE = {"gate_limit": 7.0, "gate_slope": 1.702}
ALWAYS = {"attention_sinks": True, "mlp_bias": True}
_PARTS = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_DOWN = ("mlp.experts.*.down_proj",)


def _traits(config: HFConfig) -> dict[str, Any]:
    biased, layers = bool(config["attention_bias"]), int(config["num_hidden_layers"])
    types = config.get("layer_types") or [FULL if layer % 2 else SLIDING for layer in range(layers)]
    count, beside = config.get("num_local_experts"), config.get("num_experts")
    experts = ExpertsConfig(
        count or beside or 128, config["num_experts_per_tok"], config["intermediate_size"], router_bias=True
    )
    return {
        **ALWAYS,
        "qkv_bias": biased,
        "o_bias": biased,
        "experts": experts,
        "gate_limit": config.get("swiglu_limit", GATE["gate_limit"]),
        "gate_slope": config.get("swiglu_alpha", GATE["gate_slope"]),
        **window_traits(types, layers, config.get("sliding_window")),
    }


FAMILY = Family(
    name="gpt_oss",
    hf_architectures=("GptOssForCausalLM",),
    gguf_architectures=("gpt-oss",),
    hf_defaults={
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 150000.0,
        "attention_bias": True,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    traits=_traits,
    gguf_traits={**ALWAYS, **GATE, "qkv_bias": True, "o_bias": True},
    gguf_defaults={"attention.sliding_window_pattern": 2},
    yarn_truncates=False,
    hf_layout=TensorLayout(
        names={"mlp.gate": "mlp.router"},
        joined=(
            Joined("mlp.experts.gate_up_proj_blocks", _PARTS, alternating=True),  # in MXFP4
            Joined("mlp.experts.down_proj_blocks", _DOWN),
            Joined("mlp.experts.gate_up_proj", _PARTS, alternating=True, transposed=True),
            Joined("mlp.experts.down_proj", _DOWN, transposed=True),
        ),
    ),
    gguf_layout=TensorLayout(names={"post_attention_layernorm": "post_attention_norm"}),
)
