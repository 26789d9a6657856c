"""A language model out of a GGUF file: configuration, and tensors by Hugging Face name and layout."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from fineserve_jax.errors import ModelLoadError
from fineserve_jax.loaders.gguf_file import GGUFFile
from fineserve_jax.models.model_config import ModelConfig, RopeScaling
from fineserve_jax.models.registry import family_of_gguf_architecture, get_family

_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Architectures whose sliding window, where the file has one, is that of every layer: `llama` holds Mistral, too.
_WINDOW_IN_EVERY_LAYER = ("llama",)
_LAYER_PATTERN = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")


class GGUFModel:
    """Configuration and tensors of a GGUF file.

    config: derived from the metadata and from which tensors are present.

    Raises ModelLoadError for an unsupported architecture, missing metadata, or a feature that would silently change
    results.
    """

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.config = gguf_config(file)
        self._unpermute = get_family(self.config.family).gguf_permuted_qk

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of the tensor of that Hugging Face name; None when the file lacks it."""
        info = self.file.tensors.get(gguf_tensor_name(name))
        return info.shape if info else None

    def read(self, name: str) -> np.ndarray:
        """The tensor of that Hugging Face name, f32."""
        tensor = self.file.read(gguf_tensor_name(name))
        if self._unpermute and ".q_proj." in name:
            return unpermute_heads(tensor, self.config.num_heads)
        if self._unpermute and ".k_proj." in name:
            return unpermute_heads(tensor, self.config.num_kv_heads)
        return tensor


def gguf_tensor_name(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `blk.3.ffn_up.weight`."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    match = _LAYER_PATTERN.fullmatch(name)
    if match is None or match[2] not in _LAYER_NAMES:
        raise KeyError(f"no GGUF name is known for tensor {name}")
    return f"blk.{match[1]}.{_LAYER_NAMES[match[2]]}.{match[3]}"


def unpermute_heads(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from interleaved order (0, d/2, 1, d/2 + 1, ...) to half-rotation order."""
    pairs = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(tensor.shape)


def gguf_config(file: GGUFFile) -> ModelConfig:
    """The model configuration a GGUF file describes."""
    architecture = _require(file, "general.architecture")
    family = family_of_gguf_architecture(architecture)
    _refuse_unsupported(file, architecture)

    def get(key: str, default: Any = None) -> Any:
        value = file.metadata.get(f"{architecture}.{key}", default)
        return _require(file, f"{architecture}.{key}") if value is None else value

    hidden, heads = int(get("embedding_length")), int(get("attention.head_count"))
    head_dim = int(get("attention.key_length", hidden // heads))
    context = int(get("context_length"))
    if "token_embd.weight" not in file.tensors:
        raise ModelLoadError(f"{file.path} has no tensor 'token_embd.weight'; the file is incomplete")
    return ModelConfig(
        family=family.name,
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        hidden_size=hidden,
        num_layers=int(get("block_count")),
        num_heads=heads,
        num_kv_heads=int(get("attention.head_count_kv", heads)),
        head_dim=head_dim,
        intermediate_size=int(get("feed_forward_length")),
        rope_theta=float(get("rope.freq_base", 10000.0)),
        rope_scaling=_rope_scaling(file, architecture, context),
        # Stored as f32: give back the decimal it was written from.
        norm_eps=float(np.format_float_scientific(np.float32(get("attention.layer_norm_rms_epsilon")), unique=True)),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        qk_norm="blk.0.attn_q_norm.weight" in file.tensors,
        max_position=context,
        sliding_window=_sliding_window(file, architecture),
    )


def _require(file: GGUFFile, key: str) -> Any:
    if key not in file.metadata:
        raise ModelLoadError(f"{file.path} has no metadata {key!r}; it is not a complete language model")
    return file.metadata[key]


def _refuse_unsupported(file: GGUFFile, architecture: str) -> None:
    """Features that, ignored, would give wrong text instead of an error."""
    meta = file.metadata
    if int(meta.get("split.count", 1)) > 1:
        raise ModelLoadError(
            f"{file.path} is one of {meta['split.count']} parts; merge them first (llama-gguf-split --merge)"
        )
    if int(meta.get(f"{architecture}.expert_count", 0)) > 0:
        raise ModelLoadError(f"{file.path} is a mixture of experts, which is not supported; use a dense model")
    if isinstance(meta.get(f"{architecture}.attention.head_count_kv"), list):
        raise ModelLoadError(f"{file.path} has a different number of KV heads per layer, which is not supported")
    rotated = meta.get(f"{architecture}.rope.dimension_count")
    heads, hidden = (
        meta.get(f"{architecture}.attention.head_count"),
        meta.get(f"{architecture}.embedding_length"),
    )
    head_dim = meta.get(f"{architecture}.attention.key_length", hidden // heads if heads and hidden else None)
    if rotated is not None and head_dim is not None and rotated != head_dim:
        raise ModelLoadError(
            f"{file.path} rotates {rotated} of {head_dim} values of a head (partial RoPE), which is not supported"
        )


def _sliding_window(file: GGUFFile, architecture: str) -> int | None:
    if architecture not in _WINDOW_IN_EVERY_LAYER:
        return None
    return int(file.metadata.get(f"{architecture}.attention.sliding_window", 0)) or None  # 0 is written for none


def _rope_scaling(file: GGUFFile, architecture: str, context: int) -> RopeScaling | None:
    if "rope_freqs.weight" in file.tensors:
        factors = file.read("rope_freqs.weight").ravel()
        return RopeScaling("factors", factors=tuple(float(f) for f in factors))
    prefix, meta = f"{architecture}.rope.", file.metadata
    old_linear = meta.get(prefix + "scale_linear")
    kind = meta.get(prefix + "scaling.type", "linear" if old_linear else "none")
    factor = float(meta.get(prefix + "scaling.factor", old_linear or 1.0))
    if kind == "none" or factor == 1.0:
        return None
    original = int(meta.get(prefix + "scaling.original_context_length", context))
    # The file's attn_factor multiplies yarn's own temperature: 1 leaves the derived one alone.
    multiplier = float(meta.get(prefix + "scaling.attn_factor", 1.0))
    if kind == "yarn" and multiplier != 1.0:
        raise ModelLoadError(f"{file.path}: yarn with attn_factor {multiplier} is not supported, only 1")
    return RopeScaling(kind, factor, original)
