"""When a request ends with the token that it has just got."""

from fineserve_jax.engine.request_text import RequestText
from fineserve_jax.errors import DeadEndError
from fineserve_jax.request.request import FinishReason, Request


def ending_with(request: Request, text: RequestText, token: int) -> FinishReason | DeadEndError | None:
    """Why the request ends with a token, its last one so far; None: it goes on.

    Args:
        text: the request's, of which that token is not accepted yet.
    """
    if token in request.stop_ids or text.completes_stop_string():
        return FinishReason.STOP
    if (matcher := request.matcher) is not None:
        matcher.accept(token)
        if matcher.error is not None:
            return dead_end(request, matcher.error)
        if matcher.is_complete:
            return FinishReason.STOP
    return FinishReason.LENGTH if request.num_tokens >= request.max_total_tokens else None


def dead_end(request: Request, reason: str) -> DeadEndError:
    """What is told of a request that cannot go on as its structured outputs ask."""
    return DeadEndError(
        f"the answer cannot go on as structured_outputs ask after {request.num_output_tokens} output tokens: {reason}; "
        "simplify them, or ask for what the model can write"
    )
