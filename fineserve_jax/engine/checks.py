"""What can be wrong with a request before it waits: each error names the value, the limit and the remedy."""

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from fineserve_jax.engine.build import KnownModel
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.errors import RequestError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.runner.sampling_inputs import MAX_STOP_IDS
from fineserve_jax.validation import shown, token_id


def token_list(token_ids: Any) -> list[int]:
    """A prompt's token ids as ints, out of a list, a generator, or an array of numpy, JAX or PyTorch.

    Raises:
        RequestError: anything else, or an id that is no whole number, naming its position.
    """
    if hasattr(token_ids, "__array__"):
        token_ids = np.asarray(token_ids).tolist()
    if isinstance(token_ids, str | bytes | bytearray | set | frozenset | dict) or not isinstance(token_ids, Iterable):
        raise RequestError(f"the prompt is a {type(token_ids).__name__}; give a list of token ids")
    tokens = list(token_ids)
    if all(type(token) is int for token in tokens):
        return tokens
    for place, token in enumerate(tokens):
        try:
            tokens[place] = token_id(token)
        except ValueError as error:
            raise RequestError(f"token {place} of the prompt is {shown(token)}: {error}; give a list of ids") from None
    return tokens


def check_tokens(
    served: KnownModel, token_ids: Sequence[int], sampling: SamplingParams, stop_ids: Collection[int]
) -> None:
    """Raises `RequestError` for tokens that the model does not have, or too many of them.

    Args:
        token_ids: the prompt.
        stop_ids: all tokens that end the request.
    """
    max_seq_len = served.max_seq_len
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    check_vocabulary(served, "prompt", token_ids)
    check_vocabulary(served, "logit_bias", sampling.logit_bias)
    check_vocabulary(served, "stop_token_ids", sampling.stop_token_ids)
    check_vocabulary(served, "logprob_token_ids", sampling.logprob_token_ids)
    if len(token_ids) > (most := most_prompt_tokens(max_seq_len, sampling)):
        left = ", one being left to generate" if most < max_seq_len else ""
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens; with max_seq_len={max_seq_len} it may have {most}{left}; "
            "shorten it or raise max_seq_len"
        )
    if sampling.min_tokens > max_seq_len - len(token_ids):
        raise RequestError(
            f"min_tokens={sampling.min_tokens} after a prompt of {len(token_ids)} tokens is more than "
            f"max_seq_len={max_seq_len}; lower it or raise max_seq_len"
        )
    num_stop_ids = len(stop_ids)
    if sampling.min_tokens and num_stop_ids > MAX_STOP_IDS:
        raise RequestError(
            f"min_tokens={sampling.min_tokens} has to hold back {num_stop_ids} tokens, end-of-sequence tokens "
            f"included; it can hold back {MAX_STOP_IDS}; use fewer stop_token_ids or min_tokens=0"
        )


def most_prompt_tokens(max_seq_len: int, sampling: SamplingParams) -> int:
    """Most tokens that a prompt may have: one is left to generate, if any is to be."""
    return max_seq_len if sampling.max_tokens == 0 else max_seq_len - 1


def check_vocabulary(served: KnownModel, name: str, token_ids: Collection[int]) -> None:
    """Raises `RequestError`, naming what holds them, for tokens that the model does not have."""
    vocab_size = served.model.config.vocab_size
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        wrong = next(token for token in token_ids if not 0 <= token < vocab_size)
        raise RequestError(f"{name} has token {wrong}; {served.name} has tokens 0 to {vocab_size - 1}")


def check_writes(served: KnownModel) -> None:
    """Raises `RequestError` for a model without an output head, which computes hidden states and no logits."""
    if served.model.pooling is not None and not served.model.pooling.has_head:
        raise RequestError(
            f"{served.name!r} has no output head: it makes vectors of texts, and can neither write nor score text; ask "
            "it for these (embed, or /v1/embeddings), or use a language model"
        )


def check_drafts(config: EngineConfig, options: RequestOptions) -> None:
    """Raises `RequestError` for a request that wants more drafts than the engine has."""
    asked, most = options.num_speculative_tokens, config.num_speculative_tokens
    if asked is not None and asked > most:
        raise RequestError(
            f"num_speculative_tokens={asked} is more than the engine's {most}; lower it, or give the engine "
            f"num_speculative_tokens={asked}"
        )


def check_memory(kv: KVManager, model: str, kv_precision: str, total: int) -> None:
    """Raises `RequestError` for a request whose greatest length, `total` tokens, does not fit an empty memory."""
    if not kv.fits_alone(model, kv_precision, total):
        longest = kv.max_tokens_alone(model, kv_precision)
        raise RequestError(
            f"a request of up to {total} tokens in {kv_precision} does not fit the KV memory, which holds "
            f"{longest} such tokens; lower max_tokens, choose a narrower kv_precision or raise kv_memory"
        )
