"""Reinforcement learning with tunix as the trainer and the engine as its rollout worker, for a few steps.

    pip install 'fineserve-jax[tunix]'
    python examples/tunix_rollout.py

Each step generates completions in several KV formats, compares the log-probabilities that the engine sampled by with
those that the trainer computes for the same tokens, and then trains on those of one format: REINFORCE, with the share
of different tokens as the reward. The weights are the same, in float32, on both sides, so what differs is the KV cache;
the rows of fp32 tell how much is another order of sums.
"""

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.qwen2 import model as qwen2
from tunix.rl import common
from tunix.rl.rollout.base_rollout import RolloutConfig

from fineserve_jax import LLM, LoadedModel, load_model
from fineserve_jax.entrypoints.tunix import FineServeRollout, tensors_of

FORMATS = ("fp32", "bf16", "int8", "int4")
TRAINED_ON = "bf16"
PROMPTS = (
    "The sea is",
    "In the morning",
    "My favourite food",
    "Once upon a time",
    "A good friend",
    "The city",
    "I think",
)
LEARNING_RATE = 1e-3


def trainer_of(model: LoadedModel) -> qwen2.Qwen2:
    """A tunix model of the same weights. Llama is Qwen 2 without biases; tunix's own Llama 3 has one base of RoPE."""
    config, params = model.config, model.params
    trainer = qwen2.Qwen2(
        qwen2.ModelConfig(
            num_layers=config.num_layers,
            vocab_size=config.vocab_size,
            embed_dim=config.hidden_size,
            hidden_dim=config.intermediate_size,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            num_kv_heads=config.num_kv_heads,
            rope_theta=int(config.rope_theta),
            norm_eps=config.norm_eps,
            use_tied_embedding=config.tie_embeddings,
        ),
        rngs=nnx.Rngs(0),
    )
    state = nnx.state(trainer, nnx.Param)
    tree = state.to_pure_dict()
    tree["embedder"]["input_embedding"] = params["embed"]["kernel"]
    tree["final_norm"]["w"] = params["norm"]["scale"]
    if not config.tie_embeddings:
        tree["lm_head"]["w"] = params["lm_head"]["kernel"].T
    heads, kv_heads, size = config.num_heads, config.num_kv_heads, config.head_dim
    for i in range(config.num_layers):
        own, layer = params[f"layers_{i}"], tree["layers"][i]
        q, k, v = jnp.split(own["attn"]["qkv"]["kernel"].T, [heads * size, (heads + kv_heads) * size], axis=1)
        for name, part, count in (("q_proj", q, heads), ("k_proj", k, kv_heads), ("v_proj", v, kv_heads)):
            layer["attn"][name]["w"] = part.reshape(-1, count, size)
        layer["attn"]["o_proj"]["w"] = own["attn"]["o"]["kernel"].T.reshape(heads, size, -1)
        gate, up = jnp.split(own["mlp"]["gate_up"]["kernel"].T, 2, axis=1)
        for name, part in (("gate_proj", gate), ("up_proj", up), ("down_proj", own["mlp"]["down"]["kernel"].T)):
            layer["mlp"][name]["kernel"] = part
        layer["input_layernorm"]["w"] = own["attn_norm"]["scale"]
        layer["post_attention_layernorm"]["w"] = own["mlp_norm"]["scale"]
    nnx.replace_by_pure_dict(state, tree)
    nnx.update(trainer, state)
    return trainer


def without_biases(params: Any) -> dict[str, jax.Array]:
    """Of a trainer of `trainer_of`, whose biases stay 0."""
    return {name: array for name, array in tensors_of(params).items() if not name.endswith(".bias")}


class Words:
    """The engine's tokenizer in the form that tunix wants."""

    def __init__(self, llm: LLM) -> None:
        self._tokenizer = llm.tokenizer
        (self._end, *_) = self._tokenizer.eos_token_ids

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids)

    def bos_id(self) -> int | None:
        return None

    def eos_id(self) -> int:
        return self._end

    def pad_id(self) -> int:
        return self._end


def padded(tokens: list[np.ndarray], width: int, pad: int) -> np.ndarray:
    """[B, width], padded on the right."""
    rows = np.full((len(tokens), width), pad, tokens[0].dtype)
    for row, own in zip(rows, tokens, strict=True):
        row[: len(own)] = own
    return rows


def mismatch(trained: np.ndarray, rolled: list[np.ndarray]) -> str:
    """How the trainer's log-probabilities differ from the rollout's, by d: their KL divergence as the mean of
    exp(d) - 1 - d, and the share of importance weights exp(d) that PPO's usual range of 0.2 would clip."""
    d = np.concatenate([row[: len(own)] - own for row, own in zip(trained, rolled, strict=True)]).astype(np.float64)
    kl, clipped = np.mean(np.expm1(d) - d), np.mean(np.abs(np.expm1(d)) > 0.2)
    return f"mean |d| {np.abs(d).mean():.2e}  max |d| {np.abs(d).max():.2e}  KL {kl:.1e}  clipped {clipped:.2%}"


def main(model: str = "smollm2-135m", steps: int = 3, max_tokens: int = 32) -> None:
    llm = LLM(model, weights="fp32", kv_formats=FORMATS, kv_memory="256MiB", max_batch_size=8, max_seq_len=256)
    words, trainer = Words(llm), trainer_of(load_model(model, "fp32"))
    rollouts = {
        name: FineServeRollout(trainer, words, llm=llm, kv_precision=name, tensors=without_biases) for name in FORMATS
    }
    graph, state = nnx.split(trainer)
    ends = {"pad_id": words.pad_id(), "eos_id": words.eos_id()}
    logps_of = jax.jit(functools.partial(common.compute_per_token_logps, graph, **ends))

    @jax.jit
    def trained(state: Any, prompts: jax.Array, tokens: jax.Array, weights: jax.Array) -> Any:
        def loss(state: Any) -> jax.Array:
            logps = common.compute_per_token_logps(graph, state, prompts, tokens, stop_gradient=False, **ends)
            return -(logps * weights).sum() / (weights != 0).sum().clip(1)

        def updated(path: Any, old: jax.Array, slope: jax.Array) -> jax.Array:
            return old if "_bias" in jax.tree_util.keystr(path) else old - LEARNING_RATE * slope

        return jax.tree_util.tree_map_with_path(updated, state, jax.grad(loss)(state))

    for step in range(steps):
        config = RolloutConfig(
            max_tokens_to_generate=max_tokens, temperature=1.0, max_prompt_length=24, seed=step, return_logprobs=True
        )
        outputs = {name: rollout.generate(PROMPTS, config) for name, rollout in rollouts.items()}
        for name, output in outputs.items():
            tokens = padded(output.tokens, max_tokens, words.pad_id())
            logps = np.asarray(logps_of(state, output.left_padded_prompt_tokens, tokens))
            print(f"step {step}  {name:4}  {mismatch(logps, output.logprobs)}")
        output = outputs[TRAINED_ON]
        rewards = np.array([len(set(own.tolist())) / len(own) for own in output.tokens], np.float32)
        pairs = zip(output.tokens, rewards - rewards.mean(), strict=True)
        advantages = [np.full(len(own), advantage) for own, advantage in pairs]
        tokens = padded(output.tokens, max_tokens, words.pad_id())
        state = trained(state, output.left_padded_prompt_tokens, tokens, padded(advantages, max_tokens, 0))
        rollouts[TRAINED_ON].update_params(state)  # all of them have one engine
        print(f"step {step}  mean reward {rewards.mean():.3f}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
