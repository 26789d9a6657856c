"""Mixtral: Mistral with a mixture of experts. Its GGUF files call themselves `llama` and load as such."""

from __future__ import annotations

from typing import Any

from fineserve_jax.models.family import Family, HFConfig
from fineserve_jax.models.layer_types import window_of_all
from fineserve_jax.models.model_config import ExpertsConfig
from fineserve_jax.models.tensor_layout import STACKED_EXPERTS, TensorLayout


def _traits(config: HFConfig) -> dict[str, Any]:
    count, beside = config.get("num_local_experts"), config.get("num_experts")
    experts = ExpertsConfig(count or beside or 8, config["num_experts_per_tok"], config["intermediate_size"])
    return {"experts": experts, **window_of_all(config)}


FAMILY = Family(
    name="mixtral",
    hf_architectures=("MixtralForCausalLM",),
    gguf_architectures=(),
    hf_defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "num_experts_per_tok": 2,
    },
    traits=_traits,
    hf_layout=TensorLayout(
        names={
            "mlp.gate": "block_sparse_moe.gate",
            "mlp.experts.*.gate_proj": "block_sparse_moe.experts.*.w1",
            "mlp.experts.*.up_proj": "block_sparse_moe.experts.*.w3",
            "mlp.experts.*.down_proj": "block_sparse_moe.experts.*.w2",
        },
        joined=STACKED_EXPERTS,
    ),
)
