"""What can be known to be wrong with a request before it waits: each error says what, the limit, and what to do."""

import sys
from collections.abc import Collection, Sequence

from fineserve_jax.engine.build import ServedModel
from fineserve_jax.errors import RequestError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.runner.sampler import MAX_STOP_IDS
from fineserve_jax.sampling_params import SamplingParams


def check_tokens(
    served: ServedModel, token_ids: Sequence[int], sampling: SamplingParams, stop_ids: Collection[int]
) -> None:
    """Raises `RequestError` for tokens that the model does not have, or too many of them.

    Args:
        token_ids: the prompt.
        stop_ids: all tokens that end the request.
    """
    max_seq_len = served.max_seq_len
    if not token_ids:
        raise RequestError("the prompt is empty; give at least one token")
    vocab_size = served.model.config.vocab_size
    named = {
        "prompt": token_ids,
        "logit_bias": sampling.logit_bias,
        "stop_token_ids": sampling.stop_token_ids,
    }
    for name, ids in named.items():
        if ids and not (min(ids) >= 0 and max(ids) < vocab_size):
            wrong = next(token for token in ids if not 0 <= token < vocab_size)
            raise RequestError(f"{name} has token {wrong}; {served.name} has tokens 0 to {vocab_size - 1}")
    if len(token_ids) >= max_seq_len:
        raise RequestError(
            f"the prompt has {len(token_ids)} tokens; with max_seq_len={max_seq_len} it may have "
            f"{max_seq_len - 1}, one being left to generate; shorten it or raise max_seq_len"
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


def check_targets(ttft_slo_s: float | None, tpot_slo_s: float | None, drop_when_late: bool) -> None:
    """Raises `RequestError` for latency targets that mean nothing."""
    for name, target in (("ttft_slo_s", ttft_slo_s), ("tpot_slo_s", tpot_slo_s)):
        if target is not None and not is_latency_target(target):
            raise RequestError(f"{name}={target!r} is no latency target; give seconds, more than 0, or none")
    if drop_when_late and ttft_slo_s is None:
        raise RequestError("drop_when_late without a ttft_slo_s drops nothing; give ttft_slo_s, in seconds")


def is_latency_target(seconds: float) -> bool:
    """Whether it is above 0 and a float can hold it, which a whole number from JSON may be too large for."""
    return 0 < seconds <= sys.float_info.max


def check_memory(kv: KVManager, model: str, kv_precision: str, total: int) -> None:
    """Raises `RequestError` for a request whose greatest length, `total` tokens, does not fit an empty memory."""
    if not kv.fits_alone(model, kv_precision, total):
        longest = kv.max_tokens_alone(model, kv_precision)
        raise RequestError(
            f"a request of up to {total} tokens in {kv_precision} does not fit the KV memory, which holds "
            f"{longest} such tokens; lower max_tokens, choose a narrower kv_precision or raise kv_memory"
        )
