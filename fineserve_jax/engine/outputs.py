"""What comes back from the engine."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fineserve_jax.request import Request
from fineserve_jax.runner.runner import TokenLogprobs


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a prompt.

    Attributes:
        index: which of the prompt's `n` samples.
        text: without the stop string or end-of-sequence token that ended it.
        token_ids: all tokens that were sampled, the last one included.
        logprobs: one entry a token, if asked for.
        finish_reason: "stop" (end of sequence, stop token or stop string), "length", "abort", or "late" for one that
            asked to be dropped when its first token could not be in time.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """Times in seconds; of several samples, the earliest arrival and the latest of everything else.

    Attributes:
        queue_s: from arrival to the first admission.
        ttft_s: from arrival to the first token.
        total_s: from arrival to the end.
        num_preemptions: how often it lost its pages, to be computed again or copied back.
    """

    queue_s: float
    ttft_s: float
    total_s: float
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What a prompt gave.

    Attributes:
        request_id: as given or assigned.
        prompt: the text, None if the prompt came as tokens.
        model: name of the model that answered.
        kv_precision: KV format its newest tokens were kept in.
        kv_tokens: how many of its samples' tokens were kept in each KV format at the end: more than one if it was
            narrowed, or if its format keeps the newest tokens in another.
        outputs: its `n` samples.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    model: str
    kv_precision: str
    kv_tokens: dict[str, int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics


def total_kv_tokens(samples: Iterable[Request]) -> dict[str, int]:
    """Tokens of all samples of a prompt, by the KV format they were kept in when each sample ended."""
    total: Counter[str] = Counter()
    for request in samples:
        total.update(request.kv_tokens)
    return dict(total)
