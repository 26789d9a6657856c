"""The engine behind tunix's interface of rollout workers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput

from fineserve_jax.entrypoints.tunix.tensors import tensors_of
from fineserve_jax.errors import ConfigError, EngineError, RequestError
from fineserve_jax.llm import LLM
from fineserve_jax.request.sampling_params import SamplingParams

OTHERS = {"data_type": None, "rollout_mapping_config": None, "tensor_parallel_size": -1, "data_parallel_size": -1}
"""Fields of `RolloutConfig` that the engine's own settings stand for, with their neutral values. Those that begin with
the name of another engine concern that one."""


class FineServeRollout(BaseRollout):  # type: ignore[misc]
    """Generates, and tells log-probabilities, with an engine that has the trainer's weights.

    Prompts are encoded and completions decoded by the trainer's tokenizer, so that tokens are the trainer's. Sampled
    tokens' log-probabilities are the model's, at temperature 1 and before `top_k` and `top_p`, as tunix's own sampler
    gives them.

    Args:
        rollout_actor: the trainer's model, which `model` gives back.
        tokenizer: the trainer's, as tunix adapts it: with encode, decode, bos_id, eos_id and pad_id.
        mesh: of the trainer's devices; the engine has its own.
        rollout_config: checked here, and again for each call, which brings its own.
        llm: the engine, which serves one model of the trainer's configuration.
        kv_precision: KV format of its requests; None: the engine's own.
        tensors: makes tensors of Hugging Face's names out of the trainer's parameters.

    Raises:
        ConfigError: a field of the configuration that cannot be honoured.
    """

    def __init__(
        self,
        rollout_actor: Any,
        tokenizer: Any,
        mesh: Any = None,
        rollout_config: RolloutConfig | None = None,
        *,
        llm: LLM,
        kv_precision: str | None = None,
        tensors: Callable[[Any], Mapping[str, Any]] = tensors_of,
    ) -> None:
        self._model, self._tokenizer, self._llm = rollout_actor, tokenizer, llm
        self._options: dict[str, Any] = {"kv_precision": kv_precision}
        self._tensors = tensors
        if rollout_config is not None:
            _check(rollout_config)

    def generate(self, prompts: Sequence[str], rollout_config: RolloutConfig, **kwargs: Any) -> RolloutOutput:
        """A completion of each prompt.

        Args:
            prompts: texts.
            rollout_config: how long, and how to sample. With a `seed` the i-th prompt's is that and i.
            kwargs: none are taken.

        Raises:
            ConfigError: a field that cannot be honoured.
            RequestError: a prompt of more than `max_prompt_length` tokens, or that the engine cannot serve.
            EngineError: a prompt for which the engine has no answer.
        """
        if kwargs:
            raise ConfigError(f"{', '.join(kwargs)}: not known here; say it in rollout_config, or leave it out")
        _check(rollout_config)
        encoded = [self._encode(prompt) for prompt in prompts]
        longest, width = max(map(len, encoded), default=0), rollout_config.max_prompt_length
        if longest > width:
            raise RequestError(
                f"a prompt has {longest} tokens, and max_prompt_length={width}; shorten it, or raise max_prompt_length"
            )
        params = [self._sampling(rollout_config, i) for i in range(len(prompts))]
        outputs = self._llm.generate(encoded, params, **self._options)
        for i, output in enumerate(outputs):
            if output.outputs[0].error is not None:
                raise EngineError(f"prompt {i} has no completion: {output.outputs[0].error}")
        tokens = [np.array(output.outputs[0].token_ids, np.int32) for output in outputs]
        padded = np.full((len(prompts), width), self.pad_id(), np.int32)
        for row, prompt in zip(padded, encoded, strict=True):
            row[width - len(prompt) :] = prompt
        told = [output.outputs[0].logprobs or [] for output in outputs]
        logprobs = [np.array([one.logprob for one in own], np.float32) for own in told]
        return RolloutOutput(
            text=[self._tokenizer.decode(own.tolist()) for own in tokens],
            logits=None,
            tokens=tokens,
            left_padded_prompt_tokens=padded,
            logprobs=logprobs if rollout_config.return_logprobs else None,
        )

    def get_per_token_logps(self, prompt_tokens: jax.Array, completion_tokens: jax.Array) -> jax.Array:
        """f32[B, completion], log-probabilities of completions by the weights and in the KV format that generate them;
        0 at padding.

        Args:
            prompt_tokens: i32[B, prompt], padded on the left.
            completion_tokens: i32[B, completion], padded on the right.

        Raises:
            EngineError: what the engine could not score.
        """
        prompts = [_without_padding(row, self.pad_id()) for row in np.asarray(prompt_tokens)]
        rows = [self._completion(row) for row in np.asarray(completion_tokens)]
        found = np.zeros(completion_tokens.shape, np.float32)
        scored = [i for i, row in enumerate(rows) if row]
        if scored:
            scores = self._llm.score([prompts[i] for i in scored], [[rows[i]] for i in scored], **self._options)
            for i, (score,) in zip(scored, scores, strict=True):
                if score.error is not None:
                    raise EngineError(f"completion {i} has no log-probabilities: {score.error}")
                found[i, : len(rows[i])] = score.logprobs
        return jnp.asarray(found)

    def update_params(self, params: Any, filter_types: tuple[Any, ...] | None = None) -> None:
        """Gives the engine the trainer's weights, once what it is at is answered.

        Args:
            params: all of the trainer's parameters.
            filter_types: kinds of parameters that these are; they must be complete all the same.

        Raises:
            ModelLoadError: parameters that are not those of the engine's model, or not all of them.
        """
        self._llm.update_params(self._tensors(params))

    def pad_id(self) -> int:
        return int(self._tokenizer.pad_id())

    def eos_id(self) -> int:
        return int(self._tokenizer.eos_id())

    def model(self) -> Any:
        """The trainer's model."""
        return self._model

    def _encode(self, prompt: str) -> list[int]:
        """As tunix's own sampler does: behind the token for the beginning, if there is one."""
        tokens, begin = list(self._tokenizer.encode(prompt)), self._tokenizer.bos_id()
        return tokens if begin is None or begin < 0 or tokens[:1] == [begin] else [begin, *tokens]

    def _completion(self, row: np.ndarray) -> list[int]:
        """The tokens up to the first that ends it, or ahead of the padding."""
        ends = np.flatnonzero(row == self.eos_id())
        if len(ends):
            return list(map(int, row[: ends[0] + 1]))
        real = np.flatnonzero(row != self.pad_id())
        return list(map(int, row[: real[-1] + 1])) if len(real) else []

    def _sampling(self, config: RolloutConfig, index: int) -> SamplingParams:
        ends = (self.eos_id(),) if config.eos_tokens is None else tuple(config.eos_tokens)
        return SamplingParams(
            max_tokens=config.max_tokens_to_generate,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            seed=None if config.seed is None else (_seed(config.seed) + index) % 2**32,
            stop_token_ids=ends,
            ignore_eos=True,
            logprobs=0,
        )


def _check(config: RolloutConfig) -> None:
    """Raises `ConfigError` for what only another setting of the engine could honour."""
    for name, neutral in OTHERS.items():
        if (value := getattr(config, name)) != neutral:
            raise ConfigError(
                f"rollout_config has {name}={value!r}; say so when the LLM is made, and leave it out here"
            )
    if config.expert_parallel_size != 1:
        raise ConfigError(f"expert_parallel_size={config.expert_parallel_size} cannot be honoured; leave it out")


def _seed(seed: Any) -> int:
    """A seed as a number: an integer, or the last word of one of JAX's keys."""
    if isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key):
        seed = jax.random.key_data(seed)
    return int(np.asarray(seed).reshape(-1)[-1])


def _without_padding(row: np.ndarray, pad: int) -> list[int]:
    """The tokens behind the padding on the left."""
    real = np.flatnonzero(row != pad)
    return list(map(int, row[real[0] :])) if len(real) else []
