"""What comes back from the engine."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from fineserve_jax.request.request import FinishReason, Request
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.runner.results import TokenLogprobs


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One sample of a prompt.

    Attributes:
        index: which of the prompt's `n` samples.
        text: without the stop string or end-of-sequence token that ended it.
        token_ids: all tokens that were sampled, the last one included.
        logprobs: one entry a token, if asked for.
        finish_reason: "stop" (end of sequence, stop token, stop string, or the end of what `structured_outputs` allow),
            "length", "abort", "late" for one whose `deadline_s` has passed, or that asked to be dropped when its first
            token could not be in time, or "error".
        error: with the reason "error", what went wrong: the model computed NaN or infinity, or nothing may follow that
            `structured_outputs` allow. `text` and `token_ids` are what it gave before.
    """

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: str
    error: str | None = None


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
        index: which of the call's prompts it was.
        prompt_logprobs: an entry for each token of the prompt, if asked for: None for the first, which nothing is
            before. As far as it was computed, where the first sample ended with an error, or was aborted.
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    model: str
    kv_precision: str
    kv_tokens: dict[str, int]
    outputs: list[CompletionOutput]
    metrics: RequestMetrics
    index: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None


def request_output(
    samples: Sequence[Request], texts: Sequence[str], prompt: str | None, index: int = 0
) -> RequestOutput:
    """The output of a prompt.

    Args:
        samples: its samples, all finished.
        texts: what each said.
        prompt: its text, None if it came as tokens.
        index: which of the call's prompts it was.
    """
    first = samples[0]
    return RequestOutput(
        request_id=first.request_id,
        prompt=prompt,
        prompt_token_ids=first.prompt_token_ids,
        model=first.model,
        kv_precision=first.kv_precision,
        kv_tokens=_kv_tokens(samples),
        outputs=[
            CompletionOutput(
                index=i,
                text=text,
                token_ids=request.output_token_ids,
                logprobs=list(request.logprobs) if request.sampling.gives_logprobs else None,
                finish_reason=str(request.finish_reason),
                error=None if request.error is None else str(request.error),
            )
            for i, (request, text) in enumerate(zip(samples, texts, strict=True))
        ],
        metrics=_metrics(samples),
        index=index,
        prompt_logprobs=_prompt_logprobs(first),
    )


def refused_output(prompt: str | None, options: RequestOptions, index: int, error: str) -> RequestOutput:
    """The output of a prompt that cannot be served, among others that can: one sample, whose error says why not."""
    return RequestOutput(
        request_id="",
        prompt=prompt,
        prompt_token_ids=[],
        model=options.model or "",
        kv_precision=options.kv_precision or "",
        kv_tokens={},
        outputs=[CompletionOutput(0, "", [], None, str(FinishReason.ERROR), error)],
        metrics=RequestMetrics(0.0, 0.0, 0.0, 0),
        index=index,
    )


def _prompt_logprobs(request: Request) -> list[TokenLogprobs | None] | None:
    if request.scores is None:
        return None
    not_scored = [None] * request.scores.first
    return [*not_scored, *(TokenLogprobs(score.logprob, score.top) for score in request.scores.entries)]


def _metrics(samples: Sequence[Request]) -> RequestMetrics:
    times = [request.times for request in samples]
    arrival = min(t.arrival_s for t in times)
    ended = max(t.finished_s or arrival for t in times)
    return RequestMetrics(
        queue_s=max(t.admitted_s or ended for t in times) - arrival,
        ttft_s=max(t.first_token_s or ended for t in times) - arrival,
        total_s=ended - arrival,
        num_preemptions=sum(request.num_preemptions for request in samples),
    )


def _kv_tokens(samples: Iterable[Request]) -> dict[str, int]:
    """Tokens of all samples of a prompt, by the KV format they were kept in when each sample ended."""
    total: Counter[str] = Counter()
    for request in samples:
        total.update(request.kv_tokens)
    return dict(total)
