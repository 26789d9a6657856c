"""What sampling is given: the parameters of the requests of a step, as arrays."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from fineserve_jax.request.request import Request
from fineserve_jax.request.sampling_params import MAX_LOGIT_BIAS, MAX_LOGPROB_TOKEN_IDS

Array = Any  # numpy on the host, jax.Array in the step
MAX_STOP_IDS = 64  # tokens that `min_tokens` can hold back, besides those of `logit_bias`


class SamplingInputs(NamedTuple):
    """Per sampled row (S of them; padding rows are greedy).

    Attributes:
        temperature, top_p, min_p: f32[S].
        top_k: i32[S], 0 for all.
        repetition, presence, frequency: f32[S], penalties.
        seed: u32[S].
        position: i32[S], of the token to be sampled.
        bias_ids, bias: i32 and f32[S, B]; unused entries add 0 to token 0.
        history: i32[S, max_seq_len], prompt and output tokens; -1 behind them.
        num_prompt_tokens: i32[S].
        logprob_ids: i32[S, MAX_LOGPROB_TOKEN_IDS], tokens to be told of; unused entries are 0.
        any_*: bool[], whether any row needs that part at all.
    """

    temperature: Array
    top_p: Array
    min_p: Array
    top_k: Array
    repetition: Array
    presence: Array
    frequency: Array
    seed: Array
    position: Array
    bias_ids: Array
    bias: Array
    history: Array
    num_prompt_tokens: Array
    logprob_ids: Array
    any_penalty: Array
    any_bias: Array
    any_filter: Array
    any_random: Array
    any_logprobs: Array


def build_sampling(
    requests: Sequence[Request], rows: int, max_seq_len: int, drafts: Sequence[tuple[int, ...]] | None = None
) -> SamplingInputs:
    """The parameters of the requests to be sampled, in their order, padded to `rows`.

    Args:
        drafts: of each, the tokens that are taken to follow those it has; None: none.
    """
    params = [request.sampling for request in requests]
    drafts = drafts or [()] * len(requests)
    num_tokens = [request.num_tokens + len(own) for request, own in zip(requests, drafts, strict=True)]

    def column(name: str, dtype: type, padding: float = 0) -> np.ndarray:
        values: np.ndarray = np.full(rows, padding, dtype)
        values[: len(params)] = [getattr(p, name) for p in params]
        return values

    bias_ids, bias, any_bias = _bias(requests, num_tokens, rows)
    any_penalty = any(p.uses_penalties for p in params)
    history: np.ndarray = np.broadcast_to(np.int32(-1), (rows, max_seq_len))
    if any_penalty:
        history = history.copy()
        for row, (request, own) in enumerate(zip(requests, drafts, strict=True)):
            history[row, : num_tokens[row]] = [*request.token_ids, *own]
    logprob_ids = np.zeros((rows, MAX_LOGPROB_TOKEN_IDS), np.int32)
    for row, p in enumerate(params):
        logprob_ids[row, : len(p.logprob_token_ids)] = p.logprob_token_ids
    return SamplingInputs(
        temperature=column("temperature", np.float32),
        top_p=column("top_p", np.float32, 1.0),
        min_p=column("min_p", np.float32),
        top_k=column("top_k", np.int32),
        repetition=column("repetition_penalty", np.float32, 1.0),
        presence=column("presence_penalty", np.float32),
        frequency=column("frequency_penalty", np.float32),
        seed=_padded([request.seed for request in requests], rows, np.uint32),
        position=_padded(num_tokens, rows, np.int32),
        bias_ids=bias_ids,
        bias=bias,
        history=history,
        num_prompt_tokens=_padded([request.num_prompt_tokens for request in requests], rows, np.int32),
        logprob_ids=logprob_ids,
        any_penalty=np.bool_(any_penalty),
        any_bias=np.bool_(any_bias),
        any_filter=np.bool_(any(p.temperature and (p.top_k or p.top_p < 1 or p.min_p) for p in params)),
        any_random=np.bool_(any(p.temperature for p in params)),
        any_logprobs=np.bool_(any(p.gives_logprobs for p in params)),
    )


def _padded(values: Sequence[int], rows: int, dtype: type) -> np.ndarray:
    padded: np.ndarray = np.zeros(rows, dtype)
    padded[: len(values)] = values
    return padded


def _bias(requests: Sequence[Request], num_tokens: Sequence[int], rows: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """Logit biases, and minus infinity for the stop tokens of requests that are still under `min_tokens`."""
    width = MAX_LOGIT_BIAS + MAX_STOP_IDS
    ids, values = np.zeros((rows, width), np.int32), np.zeros((rows, width), np.float32)
    any_bias = False
    for row, request in enumerate(requests):
        entries = list(request.sampling.logit_bias.items())
        num_output_tokens = num_tokens[row] - request.num_prompt_tokens
        held_back = request.matcher is None and num_output_tokens < request.sampling.min_tokens
        if held_back:  # else `token_masks` see to it, which know what else may follow
            entries += [(token, -np.inf) for token in sorted(request.stop_ids)]
        if entries:
            ids[row, : len(entries)], values[row, : len(entries)] = zip(*entries, strict=True)
            any_bias = True
    return ids, values, any_bias
