"""Samples that were interrupted, in this process or in another one, and go on with the tokens they had."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fineserve_jax.engine.detokenizer import IncrementalDetokenizer
from fineserve_jax.request import FinishReason, Request, RequestStatus
from fineserve_jax.runner.runner import TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleSoFar:
    """What a sample had when it was interrupted.

    Attributes:
        token_ids: its output.
        logprobs: one entry a token, if it asked for them.
        kv_tokens: of a sample that had ended, see `Request.kv_tokens`.
    """

    token_ids: Sequence[int]
    logprobs: Sequence[TokenLogprobs] = ()
    kv_tokens: Mapping[str, int] = field(default_factory=dict)


def take_token(request: Request, detokenizer: IncrementalDetokenizer, token: int) -> FinishReason | None:
    """Adds a token's text to that of its request; returns why the request ends with it, None if it goes on."""
    if token in request.stop_ids:
        detokenizer.stop_at(token)
        return FinishReason.STOP
    if detokenizer.push(token):
        return FinishReason.STOP
    return FinishReason.LENGTH if request.num_tokens >= request.max_total_tokens else None


def replay(request: Request, detokenizer: IncrementalDetokenizer, so_far: SampleSoFar) -> None:
    """Gives a request that nobody serves yet the tokens it had; it is finished if it ends with the last of them.

    Its random numbers go on where they stopped, since a token's depend on the request's seed and the token's position.
    """
    for token in so_far.token_ids:
        request.token_ids.append(token)
        if (reason := take_token(request, detokenizer, token)) is not None:
            detokenizer.finish()
            request.status, request.finish_reason = RequestStatus.FINISHED, reason
            request.times.finished_s, request.kv_tokens = request.times.arrival_s, dict(so_far.kv_tokens)
            break
    request.logprobs.extend(so_far.logprobs)
    if so_far.token_ids:
        request.times.first_token_s = request.times.arrival_s  # it is not late any more
