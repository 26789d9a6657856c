"""Samples that were interrupted, in this process or in another one, and go on with the tokens they had."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fineserve_jax.engine.endings import ending_with
from fineserve_jax.engine.request_text import RequestText
from fineserve_jax.errors import FineServeError
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.runner.results import TokenLogprobs


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


def replay(request: Request, text: RequestText, so_far: SampleSoFar) -> None:
    """Gives a request that nobody serves yet the tokens it had; it is finished if it ends with the last of them.

    Its random numbers go on where they stopped, since a token's depend on the request's seed and the token's position.
    """
    request.logprobs.extend(so_far.logprobs)
    for token in so_far.token_ids:
        request.token_ids.append(token)
        ending = ending_with(request, text, token)
        if ending is not None:
            _finish(request, text, ending, so_far)
            return
        text.accept()
    if so_far.token_ids:
        request.times.first_token_s = request.times.arrival_s  # it is not late any more


def _finish(request: Request, text: RequestText, ending: FinishReason | FineServeError, so_far: SampleSoFar) -> None:
    if isinstance(ending, FineServeError):
        request.error, request.finish_reason = ending, FinishReason.ERROR
    else:
        request.finish_reason = ending
    text.end()
    request.status, request.kv_tokens = RequestStatus.FINISHED, dict(so_far.kv_tokens)
    request.times.first_token_s = request.times.finished_s = request.times.arrival_s
