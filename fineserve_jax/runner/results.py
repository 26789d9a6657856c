"""What steps give the engine: tokens and their log-probabilities, scores, and what went wrong."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from fineserve_jax.request.request import Request, ScheduledChunk, TokenScore
from fineserve_jax.runner.sampler import Sampled


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities, natural, at one position.

    Attributes:
        logprob: of the token that was sampled, or that stands there in the prompt.
        top: token id -> log-probability of the most likely tokens, likeliest first.
        asked: token id -> log-probability of `SamplingParams.logprob_token_ids`, in their order.
    """

    logprob: float
    top: dict[int, float]
    asked: dict[int, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """A request's next token; `logprobs` only if it asked for them."""

    request: Request
    token: int
    logprobs: TokenLogprobs | None


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave.

    Attributes:
        tokens: the sampled tokens; of a request with drafts one more than there are drafts that it would have sampled
            itself, in their order.
        nonfinite: the requests for which the step computed NaN or infinity, be it for one token of a chunk; nothing is
            sampled for them. Each with the stage whose output was the first such, or None without `check_finite`.
        stuck: the requests that may sample nothing by their structured outputs, each with the reason.
        scores: of prompt tokens, those of each request in their order, as `ScheduledChunk.scored` names them.
        hidden: f32[tokens, hidden], for each of those what the last layer gave for the token before, of requests that
            keep it.
        pooled: f64[hidden], sums of hidden states, of requests that pool them, over the tokens of the step that
            `PromptPooling.wanted` names.
    """

    tokens: list[SampledToken]
    nonfinite: dict[Request, str | None]
    stuck: dict[Request, str]
    scores: dict[Request, list[TokenScore]]
    hidden: dict[Request, np.ndarray]
    pooled: dict[Request, np.ndarray] = field(default_factory=dict)


def accepted(
    chunks: Iterable[ScheduledChunk],
    tokens: Sequence[SampledToken],
    finite_slots: np.ndarray,
    finite_logits: np.ndarray,
) -> tuple[list[SampledToken], dict[Request, bool]]:
    """What was sampled, of drafts only behind those that are what was sampled in their place, so that each token is
    the one that decoding token by token gives. Where a draft's row is not finite, what is ahead of it stands, and the
    next step computes it again.

    Args:
        chunks: those behind which a token is sampled.
        tokens: of each sampled row, in their order.
        finite_slots: bool[N], see `step.finite_slots`.
        finite_logits: bool[S], of each sampled row.

    Returns:
        the tokens, and of each sampled request whether the logits of the first are finite.
    """
    kept, finite, row = [], {}, 0
    for chunk in chunks:
        kept.append(tokens[row])
        finite[chunk.request] = bool(finite_logits[row])
        for place, draft in enumerate(chunk.drafts, row):
            is_finite = finite_slots[place + 1] and finite_logits[place + 1]  # decodes are sampled row by row
            if tokens[place].token != draft or not is_finite:
                break
            kept.append(tokens[place + 1])
        row += 1 + len(chunk.drafts)
    return kept, finite


def sampled_tokens(requests: Sequence[Request], sampled: Sampled) -> list[SampledToken]:
    """The token of each sampled row. `requests`: of each, in their order; `sampled`: on the host."""
    tokens = []
    for i, request in enumerate(requests):
        logprobs, sampling = None, request.sampling
        if sampling.gives_logprobs:
            wanted, asked = sampling.logprobs or 0, sampling.logprob_token_ids
            top = zip(sampled.top_ids[i, :wanted].tolist(), sampled.top_logprobs[i, :wanted].tolist(), strict=True)
            of_asked = zip(asked, sampled.asked_logprobs[i, : len(asked)].tolist(), strict=True)
            logprobs = TokenLogprobs(float(sampled.logprobs[i]), dict(top), dict(of_asked))
        tokens.append(SampledToken(request, int(sampled.tokens[i]), logprobs))
    return tokens
