"""Writes small GGUF files from the fixture checkpoints, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from model_oracle import case_config, case_tensors

from fineserve_jax.loaders.gguf_names import gguf_tensor_name
from fineserve_jax.loaders.hf_config import hf_config
from fineserve_jax.models.rope import rope_frequencies

ARCHITECTURES = {"llama": "llama", "smollm2": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}


def permuted(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Value i of a head's second half goes next to value i of its first half."""
    out = np.empty_like(tensor)
    size = len(tensor) // heads
    for head in range(heads):
        for i in range(size // 2):
            out[head * size + 2 * i] = tensor[head * size + i]
            out[head * size + 2 * i + 1] = tensor[head * size + size // 2 + i]
    return out


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
    config, architecture = hf_config(case_config(case)), ARCHITECTURES[case]
    writer = gguf.GGUFWriter(path, architecture)
    numbers = {
        "context_length": config.max_position,
        "embedding_length": config.hidden_size,
        "block_count": config.num_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_kv_heads,
        "attention.key_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    for key, number in numbers.items():
        if key not in leave_out:
            writer.add_uint32(f"{architecture}.{key}", number)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", config.norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", config.rope_theta)
    if tokenizer:
        add_byte_tokenizer(writer)
    if config.sliding_window is not None:
        writer.add_uint32(f"{architecture}.attention.sliding_window", config.sliding_window)
        full = [layer in config.full_attention_layers for layer in range(config.num_layers)]
        writer.add_array(f"{architecture}.attention.sliding_window_pattern", [not attends for attends in full])
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        writer.add_string(f"{architecture}.rope.scaling.type", "linear")
        writer.add_float32(f"{architecture}.rope.scaling.factor", scaling.factor)
    for name, tensor in case_tensors(case).items():
        heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}.get(name.split(".")[-2])
        if architecture == "llama" and heads:
            tensor = permuted(tensor, heads)
        if architecture == "gemma3" and name.endswith("norm.weight"):
            tensor = tensor.astype(np.float32) + 1.0
        stored = gguf_tensor_name(name, config.post_norms)
        if stored not in leave_out:
            add_tensor(writer, stored, tensor.astype(np.float32), quant)
    if scaling is not None and scaling.kind != "linear":
        factors = config.rope_theta ** (-np.arange(config.head_dim // 2) / (config.head_dim // 2))
        add_tensor(writer, "rope_freqs.weight", (factors / rope_frequencies(config)[0]).astype(np.float32))
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


def add_byte_tokenizer(writer: gguf.GGUFWriter, pre: str = "default") -> None:
    """96 tokens of byte-level BPE: printable letters, one merge, and three control tokens."""
    letters = [chr(code) for code in range(33, 125)]
    tokens = [*letters, "he", "<|end|>", "<|start|>", "Ġ"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 93 + [3, 3, 1])
    writer.add_token_merges(["h e"])
    writer.add_eos_token_id(93)
    writer.add_bos_token_id(94)
