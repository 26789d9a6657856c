"""A request, its life, and what a step computes of it: the nouns that the engine, the scheduler and kv/ share.

    WAITING --admitted (level 1: it holds the pages of its known tokens)--> READY
    READY   --picked for a step (level 2)--> RUNNING --stop, length, abort, error--> FINISHED
    READY or RUNNING --preempted (its pages are freed, its tokens kept)--> WAITING

READY and RUNNING both hold memory; RUNNING has had at least one step since it was admitted.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fineserve_jax.errors import FineServeError
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.request.structured.matcher import TokenMatcher

NO_OPTIONS = RequestOptions()


class RequestStatus(enum.Enum):
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    FINISHED = "finished"


class FinishReason(enum.StrEnum):
    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    LATE = "late"
    ERROR = "error"


@dataclass(slots=True)
class RequestTimes:
    """When things happened, in seconds of the engine's clock; None: not yet."""

    arrival_s: float
    admitted_s: float | None = None
    first_token_s: float | None = None
    finished_s: float | None = None


class TokenScore(NamedTuple):
    """What a model thinks of a token that is given.

    Attributes:
        logprob: its log-probability, natural, after the tokens before it.
        is_greedy: whether it is the one that greedy sampling would have chosen.
        top: token id -> log-probability of the most likely tokens, as many as were asked for, likeliest first.
    """

    logprob: float
    is_greedy: bool
    top: dict[int, float]


@dataclass(slots=True)
class PromptScores:
    """Scores of a prompt's tokens, which come as it is computed, chunk by chunk.

    Attributes:
        first: index of the first token that is scored; at least 1, as nothing is before the first of a prompt.
        num_top: how many of the most likely tokens are wanted at each.
        entries: of the tokens from `first` on, as far as they are known, which they stay, whatever happens to the
            request's pages.
        hidden: with the entries, what the last layer gave for the token before each, f32[tokens, hidden] of each step;
            None: it is not kept.
    """

    first: int
    num_top: int
    entries: list[TokenScore] = field(default_factory=list)
    hidden: list[Any] | None = None

    @property
    def next(self) -> int:
        """Index of the first token whose score is not known."""
        return self.first + len(self.entries)


@dataclass(slots=True)
class PromptPooling:
    """The sum of what the model gives for a prompt's tokens, which comes as it is computed, chunk by chunk.

    Attributes:
        first: index of the first token that counts: 0 for a mean, that of the last token for that alone.
        count: how many of the tokens from `first` on are in the sum, which they stay, whatever happens to the request's
            pages.
        total: the sum of their last hidden states, f64[hidden]; 0 where there are none.
    """

    first: int
    count: int = 0
    total: Any = 0.0

    def wanted(self, start: int, stop: int) -> range:
        """Which of the tokens that a chunk computes are yet to be added."""
        return range(max(start, self.first + self.count), stop)


@dataclass(eq=False, slots=True)
class Request:
    """One sequence on its way through the engine. `eq=False`: identity is what makes a request itself.

    Attributes:
        request_id: unique in the engine.
        model: name of the model that serves it.
        kv_precision: name of the KV format its pages are kept in.
        token_ids: prompt and output, in order.
        num_prompt_tokens: how many of them are the prompt.
        max_total_tokens: length at which it ends: the lesser of prompt plus `max_tokens` and `max_seq_len`.
        num_computed_tokens: leading tokens whose K and V are in the cache, or saved in host memory; preemption sets it
            back to 0 unless they are saved.
        sequence: order of arrival, a strictly increasing number.
        seed: of its random numbers.
        stop_ids: tokens that end it: the model's end-of-sequence tokens unless ignored, and `stop_token_ids`.
        min_kv_precision: name of the narrowest KV format its older pages may be narrowed to when memory is short;
            None: they stay as they are.
        shares_prefix: whether it may start from pages that others computed, and leave its own to others.
        long_after: most tokens of a sequence that RoPE turns by its factors for short sequences, where the model has
            others for longer ones (longrope): a request that outgrows it is computed again. None: it makes none.
        error: what a caller may raise, if it has ended with the reason ERROR.
        kv_tokens: when it has ended, how many of its tokens were kept in each KV format then.
        fork_of: another sample of the same prompt, whose pages it may start from; None: there is none.
        options: what was asked for: tenant, priority and targets count; the model and the KV formats that this came to
            are those above.
        matcher: how far its output has come in what `structured_outputs` ask for; None: any token may follow.
        scores: of its prompt's tokens, or of its branches; None: nobody asked for them.
        branches: texts that go on from its prompt, each by itself, whose tokens are scored with the step that ends the
            prompt; they leave nothing in the cache.
        pooling: of the prompt's hidden states; None: nobody asked for them.
    """

    request_id: str
    model: str
    kv_precision: str
    sampling: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    max_total_tokens: int
    sequence: int
    times: RequestTimes
    seed: int = 0
    stop_ids: frozenset[int] = frozenset()
    min_kv_precision: str | None = None
    shares_prefix: bool = True
    long_after: int | None = None
    fork_of: "Request | None" = None
    options: RequestOptions = NO_OPTIONS
    matcher: TokenMatcher | None = None
    scores: PromptScores | None = None
    branches: tuple[tuple[int, ...], ...] = ()
    pooling: PromptPooling | None = None
    status: RequestStatus = RequestStatus.WAITING
    num_computed_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    error: FineServeError | None = None
    logprobs: list[Any] = field(default_factory=list)
    kv_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def prompt_token_ids(self) -> list[int]:
        return self.token_ids[: self.num_prompt_tokens]

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def is_long(self) -> bool:
        """Whether its tokens are turned by the factors for long sequences, see `long_after`."""
        return self.long_after is not None and len(self.token_ids) > self.long_after

    @property
    def prefix_root(self) -> bytes:
        """What the hashes of its blocks begin with: prefixes of different roots are never shared."""
        return b"long" if self.is_long else b""

    @property
    def num_shareable_tokens(self) -> int:
        """Leading tokens that may have been computed for others: the next one has to go through the model for this
        request, since what follows it is sampled, or scored."""
        if self.scores is None or self.scores.next >= self.num_prompt_tokens:
            return len(self.token_ids) - 1
        return self.scores.next - 1

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens still to go through the model before the next one can be sampled; 1 while decoding."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_decoding(self) -> bool:
        """Whether all it has to compute is its last token."""
        return len(self.token_ids) - self.num_computed_tokens == 1 and not self.branches

    @property
    def allows_drafts(self) -> bool:
        """Whether tokens may be guessed: not where what may follow one depends on what the host makes of it first."""
        return self.matcher is None and not self.sampling.logits_processors


def num_branch_tokens(branches: Sequence[Sequence[int]]) -> int:
    """Tokens of branches that go through the model: not the last of each, as nobody asks what follows it."""
    return sum(map(len, branches)) - len(branches)


@dataclass(slots=True, unsafe_hash=True)  # frozen, it would take a microsecond more to create, for every row and step
class ScheduledChunk:
    """What a step computes of one request: its tokens `[start, start + count)`.

    `count == 1` without branches goes through the step's decode rows, anything else is a prefill chunk. A chunk starts
    at a multiple of the page size. Nobody changes one.

    Attributes:
        drafts: of a decode, tokens that are guessed to follow. Each goes through a decode row of its own; all of them,
            and the token itself, lie in one page.
        branches: of a chunk that ends with its prompt, the request's: all their tokens but the last of each go through
            the model behind the chunk's, and see the prompt and what is ahead of them in their own branch.
    """

    request: Request
    start: int
    count: int
    drafts: tuple[int, ...] = ()
    branches: tuple[tuple[int, ...], ...] = ()

    @property
    def num_slots(self) -> int:
        """Tokens of a chunk that go through the model, its branches' too."""
        return self.count + num_branch_tokens(self.branches)

    @property
    def samples(self) -> bool:
        """Whether the step reaches the request's last known token, so that a next one is sampled, if it wants any."""
        return self.start + self.count == self.request.num_tokens < self.request.max_total_tokens

    @property
    def scored(self) -> range:
        """Indices of the prompt tokens whose scores the step gives: those behind the tokens that it computes."""
        scores = self.request.scores
        if scores is None:
            return range(0)
        stop = min(self.start + self.count + 1, self.request.num_prompt_tokens)
        first = max(self.start + 1, scores.next)
        assert first == scores.next or first >= stop, f"token {scores.next} would never be scored"
        return range(first, stop)


@dataclass(frozen=True, slots=True)
class SchedulerOutput:
    """What one step computes, decided on the host. `decodes` all have `count == 1`, `prefills` have more, or branches;
    `chunks` are both, decodes first."""

    decodes: tuple[ScheduledChunk, ...]
    prefills: tuple[ScheduledChunk, ...]

    @property
    def chunks(self) -> tuple[ScheduledChunk, ...]:
        return self.decodes + self.prefills

    @property
    def num_decode_rows(self) -> int:
        """Rows that the decodes take, their drafts counted."""
        return sum(1 + len(scheduled.drafts) for scheduled in self.decodes)

    @property
    def num_tokens(self) -> int:
        """Tokens that go through the model."""
        return self.num_decode_rows + sum(scheduled.num_slots for scheduled in self.prefills)
