"""What comes back from the engine, and the text that grows token by token on its way there."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from fineserve_jax.loaders.tokenizer import StreamDecoder, Tokenizer
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


@dataclass(slots=True)
class GrowingText:
    """The text of one sequence: decoded as tokens come, and cut where a stop string begins.

    Text that may yet turn out to be the beginning of a stop string is held back from `take`.
    """

    tokenizer: Tokenizer
    stop: Sequence[str]
    text: str = ""
    stopped: bool = False
    _taken: int = 0
    _decoder: StreamDecoder = field(init=False)

    def __post_init__(self) -> None:
        self._decoder = self.tokenizer.stream()

    def push(self, token: int) -> bool:
        """Adds a token; returns whether a stop string was completed."""
        return self._extend(self._decoder.push(token))

    def finish(self) -> None:
        """No more tokens will come: everything that is left may be taken."""
        if not self.stopped:
            self._extend(self._decoder.flush())
            self.stopped = True

    def take(self) -> str:
        """The text that became certain since the last call."""
        end = len(self.text) if self.stopped else len(self.text) - self._held_back()
        piece = self.text[self._taken : end]
        self._taken = max(self._taken, end)
        return piece

    def _extend(self, piece: str) -> bool:
        # A stop string may have begun in what came before.
        start = max(0, len(self.text) - max((len(s) for s in self.stop), default=0))
        self.text += piece
        found = [at for s in self.stop if (at := self.text.find(s, start)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True
        return bool(found)

    def _held_back(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        lengths = (
            n for s in self.stop for n in range(min(len(s) - 1, len(self.text)), 0, -1) if self.text.endswith(s[:n])
        )
        return max(lengths, default=0)
