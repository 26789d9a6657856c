"""The parameters of tunix's Llama 3, Qwen 2 and Qwen 3, as tensors by the names of Hugging Face's checkpoints."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax

from fineserve_jax.errors import ModelLoadError

OUTSIDE = {
    "embedder.input_embedding": "model.embed_tokens.weight",
    "final_norm.w": "model.norm.weight",
    "lm_head.w": "lm_head.weight",
}
IN_LAYER = {
    "input_layernorm.w": "input_layernorm.weight",
    "post_attention_layernorm.w": "post_attention_layernorm.weight",
    **{f"attn.{part}_proj.w": f"self_attn.{part}_proj.weight" for part in "qkvo"},
    **{f"attn.{part}_bias": f"self_attn.{part}_proj.bias" for part in "qkv"},
    **{f"attn.{part}_norm.w": f"self_attn.{part}_norm.weight" for part in "qk"},
    **{f"mlp.{part}_proj.kernel": f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")},
}


def tensors_of(params: Any) -> dict[str, jax.Array]:
    """Tensors that `LLM.update_params` takes, `[out, in]` as in the checkpoints.

    Args:
        params: as tunix gives them to `BaseRollout.update_params`: a tree of nnx parameters, or of arrays.

    Raises:
        ModelLoadError: a parameter that these models do not have, such as those of LoRA.
    """
    tensors = {}
    for path, array in _flat(params):
        layers, _, rest = path.partition(".")
        number, _, part = rest.partition(".")
        if path in OUTSIDE:
            tensors[OUTSIDE[path]] = array.T if path == "lm_head.w" else array
        elif layers == "layers" and number.isdigit() and part in IN_LAYER:
            tensors[f"model.layers.{number}.{IN_LAYER[part]}"] = _as_stored(part, array)
        else:
            raise ModelLoadError(
                f"parameter {path!r} is none of tunix's Llama 3, Qwen 2 or Qwen 3; give FineServeRollout a function "
                "that makes tensors of it, as `tensors`, and merge adapters such as LoRA's before"
            )
    return tensors


def _as_stored(part: str, array: jax.Array) -> jax.Array:
    """What checkpoints have of projections `[in, heads, head_dim]` and `[heads, head_dim, out]`, and of matrices
    `[in, out]`; biases and norms as they are."""
    if part == "attn.o_proj.w":
        return array.reshape(-1, array.shape[-1]).T
    if part.endswith("_proj.w"):
        return array.reshape(array.shape[0], -1).T
    return array.T if part.endswith(".kernel") else array.reshape(-1)


def _flat(params: Any) -> Iterator[tuple[str, jax.Array]]:
    """Each array with its path. What is ahead of `value` in the path of an nnx parameter is its place in the model."""
    tree = params.to_pure_dict() if hasattr(params, "to_pure_dict") else params
    if not isinstance(tree, Mapping):
        raise ModelLoadError(f"parameters are given as a {type(params).__name__}; give a tree of them by name")
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        yield ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path), leaf
