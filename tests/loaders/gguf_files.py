"""Writes small GGUF files from the fixture checkpoints, as llama.cpp's converter lays them out."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from model_oracle import Tensors, case_config, case_tensors

from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.models import ModelConfig
from fineserve_jax.models.rope import rope_frequencies

ARCHITECTURES = {
    "llama": "llama",
    "smollm2": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3",
    "granite": "granite",
    "phi3": "phi3",
    "phi3_short": "phi3",
    "phi3_long": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "smollm3": "smollm3",
    "cohere2": "cohere2",
    "gpt_oss": "gpt-oss",
    "mixtral": "llama",
    "qwen3_moe": "qwen3moe",
}
PERMUTED = ("llama", "granite", "smollm3")
_EXPERT = re.compile(r"(model\.layers\.\d+\..*experts)\.\d+\.(.*)")


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Value i of a head's second half goes next to value i of its first half."""
    out = np.empty_like(tensor)
    size = len(tensor) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = tensor[head * size + i]
            out[head * size + 2 * i + 1] = tensor[head * size + size // 2 + i]
    return out


def converted(case: str) -> Tensors:
    """The tensors of a fixture case by the names that llama.cpp's converter gives them."""
    config, architecture = hf_config(case_config(case)), ARCHITECTURES[case]
    kind = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(kind, config.num_layers)
    stacks: dict[str, list[np.ndarray]] = {}
    for name, tensor in (_apart(case_tensors(case)) if case == "gpt_oss" else case_tensors(case)).items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if architecture in PERMUTED and heads:
            tensor = permuted(tensor, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor.astype(np.float32) + 1.0
        # Experts are in the order of their numbers, of which there are fewer than ten.
        stacked = _EXPERT.sub(r"\1.\2", name).replace("block_sparse_moe.experts", "feed_forward.experts")
        found = names.get_name(
            stacked.removeprefix("model.") if "feed_forward" in stacked else stacked, (".weight", ".bias")
        )
        assert found is not None, f"llama.cpp has no name for {name}"
        stacks.setdefault(found + (".weight" if name.endswith("sinks") else ""), []).append(tensor)
    return {name: tensors[0] if len(tensors) == 1 else np.stack(tensors) for name, tensors in stacks.items()}


def _apart(tensors: Tensors) -> Tensors:
    """gpt-oss's gates and what they gate, whose columns alternate, apart and `[out, in]`."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        bias, part = name.endswith("_bias"), name.removesuffix("_bias")
        if not part.endswith("experts.gate_up_proj") and not part.endswith("experts.down_proj"):
            found[name] = tensor
            continue
        end = ".bias" if bias else ".weight"
        rows = tensor if bias else tensor.swapaxes(1, 2)
        if part.endswith("down_proj"):
            found[part + end] = rows
        else:
            gate, up = part.replace("gate_up", "gate") + end, part.replace("gate_up", "up") + end
            found |= {gate: rows[:, 0::2], up: rows[:, 1::2]}
    return found


def numbers(case: str) -> dict[str, int | float]:
    """Metadata under the architecture's name."""
    raw = case_config(case)
    config = hf_config(raw)
    found: dict[str, int | float] = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.rotated,
        f"attention.layer_norm_{'rms_' if config.norm == 'rms' else ''}epsilon": config.norm_eps,
        "rope.freq_base": config.rope_theta,
    }
    keys = {
        "embedding_scale": "embedding_multiplier",
        "attention.scale": "attention_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logit_scale" if "logit_scale" in raw else "logits_scaling",
    }
    found |= {key: float(raw[name]) for key, name in keys.items() if name in raw}
    if config.local_rope_theta is not None:
        found["rope.freq_base_swa"] = config.local_rope_theta
    if config.experts is not None:
        found |= {"expert_count": config.experts.count, "expert_used_count": config.experts.used}
    if "moe_intermediate_size" in raw:
        found["expert_feed_forward_length"] = raw["moe_intermediate_size"]
    if config.long_after is not None:
        original = raw["original_max_position_embeddings"]
        found["rope.scaling.original_context_length"] = original
        stretch = math.log(config.max_position / original) / math.log(original)
        found["rope.scaling.attn_factor"] = math.sqrt(1 + stretch)
    return found


def rope_tensors(config: ModelConfig) -> Tensors:
    """Factors of rotations, where the converter spells them out."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind in ("linear", "yarn"):
        return {}
    if scaling.kind == "longrope":
        lists = {"rope_factors_short.weight": scaling.factors, "rope_factors_long.weight": scaling.long_factors}
        return {name: np.array(factors, np.float32) for name, factors in lists.items()}
    plain, _ = rope_frequencies(dataclasses.replace(config, rope_scaling=None))
    return {"rope_freqs.weight": plain / rope_frequencies(config)[0]}


def write_gguf(
    path: Path,
    case: str,
    quant: Type = Type.F16,
    leave_out: tuple[str, ...] = (),
    tokenizer: bool = True,
    more: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
) -> Path:
    """A GGUF file of a fixture case, its matrices stored as `quant`; keys and tensors can be left out.

    more: adds keys and tensors.
    """
    architecture = ARCHITECTURES[case]
    writer = gguf.GGUFWriter(path, architecture)
    for key, number in numbers(case).items():
        if key not in leave_out:
            add = writer.add_float32 if isinstance(number, float) else writer.add_uint32
            add(f"{architecture}.{key}", number)
    if tokenizer:
        add_byte_tokenizer(writer, hf_config(case_config(case)).vocab_size)
    config = hf_config(case_config(case))
    if config.sliding_window is not None:
        writer.add_uint32(f"{architecture}.attention.sliding_window", config.sliding_window)
        full = [layer in config.full_attention_layers for layer in range(config.num_layers)]
        writer.add_array(f"{architecture}.attention.sliding_window_pattern", [not attends for attends in full])
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind in ("linear", "yarn"):
        writer.add_string(f"{architecture}.rope.scaling.type", scaling.kind)
        writer.add_float32(f"{architecture}.rope.scaling.factor", scaling.factor)
        writer.add_uint32(f"{architecture}.rope.scaling.original_context_length", scaling.original_max_position)
        writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_fast", scaling.beta_fast)
        writer.add_float32(f"{architecture}.rope.scaling.yarn_beta_slow", scaling.beta_slow)
    for name, tensor in (converted(case) | rope_tensors(config)).items():
        if name not in leave_out:
            add_tensor(writer, name, tensor.astype(np.float32), quant)
    more(writer)
    return finish(writer, path)


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, quant: Type = Type.F32) -> None:
    """Vectors stay F32, as llama.cpp keeps them."""
    kind = quant if tensor.ndim > 1 else Type.F32
    writer.add_tensor(name, gguf.quantize(tensor, kind), raw_dtype=kind)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_byte_tokenizer(writer: gguf.GGUFWriter, vocab_size: int = 96, pre: str = "default") -> None:
    """96 tokens of byte-level BPE, printable letters, one merge, and control tokens; and more of those if need be."""
    letters = [chr(code) for code in range(33, 125)]
    tokens = [*letters, "he", "<|end|>", "<|start|>", "Ġ", *(f"<|{i}|>" for i in range(96, vocab_size))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 93 + [3, 3, 1] + [3] * (vocab_size - 96))
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(93)
    writer.add_bos_token_id(94)
