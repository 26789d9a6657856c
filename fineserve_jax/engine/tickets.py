"""Tickets: what callers of the engine loop hold of the prompts that they handed in."""

import logging
import weakref
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from fineserve_jax.engine.outputs import RequestOutput, request_output
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.engine.request_text import Known
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.request.request import FinishReason, Request, RequestStatus
from fineserve_jax.runner.results import TokenLogprobs

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """What came of a sample since it was looked at before.

    Attributes:
        sample: which of the prompt's.
        text: that became certain.
        token_ids: new ones; their text may yet be held back.
        logprobs: one entry a new token, if asked for.
        finish_reason: how the sample ended; None: it goes on.
        error: with the reason "error", what went wrong.
    """

    sample: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None
    finish_reason: FinishReason | None = None
    error: BaseException | None = None


class Receiver(Protocol):
    """Who is told about tickets. Its methods are called on the loop's thread, and must neither wait nor compute.

    Attributes:
        wants_stats: whether `show` is to be called after every step.
    """

    wants_stats: bool

    def notify(self, tickets: "Sequence[Ticket]") -> None:
        """These tickets are done, or there is more of their text, of those that want pieces."""

    def show(self, stats: EngineStats) -> None:
        """How the engine stands after a step."""


class SampleText(Protocol):
    """The text of a sample, for one thread that reads it; `RequestText` is one.

    Attributes:
        known: what may be read of its request now.
        text: so far.
    """

    @property
    def known(self) -> Known: ...

    @property
    def text(self) -> str: ...

    def take(self) -> str:
        """The text that became certain since the last call."""


class Ticket:
    """A prompt in the loop, with its `n` samples.

    Args:
        prepared: the prompt, checked; another one when the ticket is given to another engine.
        receiver: who is told, as long as somebody else holds it.
        prompt: its text, None if it came as tokens.
        index: which of the caller's prompts it is.
        wants_pieces: whether the receiver is told of each token, and not only of the end.

    Attributes:
        samples: in the engine; empty until the loop has taken the ticket.
        is_done: all samples have ended, or there is an `error`.
        error: why there is no output; None: there is one, or it is not done yet.
    """

    __slots__ = (
        "__weakref__",
        "_is_announced",
        "_num_left",
        "_num_told",
        "_receiver",
        "_texts",
        "error",
        "index",
        "is_done",
        "prepared",
        "prompt",
        "samples",
        "wants_pieces",
    )

    def __init__(
        self,
        prepared: PreparedRequest,
        receiver: Receiver,
        prompt: str | None = None,
        index: int = 0,
        *,
        wants_pieces: bool = False,
    ) -> None:
        self.prepared, self.prompt, self.index = prepared, prompt, index
        self._receiver = weakref.ref(receiver)
        self.wants_pieces = wants_pieces
        self.samples: list[Request] = []
        self._texts: Sequence[SampleText] = []
        self.is_done = False
        self.error: BaseException | None = None
        self._num_left = 0
        self._num_told: dict[int, int] = {}  # of each sample that has not been seen to its end, the tokens told
        self._is_announced = False

    @property
    def receiver(self) -> Receiver | None:
        """Who is told; None: nobody is there any more."""
        return self._receiver()

    @property
    def has_not_begun(self) -> bool:
        """Whether none of its samples has had memory."""
        samples = self.samples
        return not self.is_done and all(
            sample.status is RequestStatus.WAITING and sample.times.admitted_s is None for sample in samples
        )

    # -- the loop's thread ---------------------------------------------------------------------------------------

    def begin(self, samples: list[Request], texts: Sequence[SampleText]) -> None:
        """The engine has taken the prompt."""
        self.samples, self._num_left = samples, len(samples)
        self._num_told = dict.fromkeys(range(len(samples)), 0)
        self._texts = texts  # the last of all: whoever finds it finds the others

    def note_finished(self) -> bool:
        """A sample has ended; whether it was the last."""
        self._num_left -= 1
        return not self._num_left

    def announce(self) -> bool:
        """Whether the receiver is to be told: not while it has yet to look at what it was told before."""
        is_new, self._is_announced = not self._is_announced, True
        return is_new

    # -- the caller's thread -------------------------------------------------------------------------------------

    def take(self) -> tuple[str, bool]:
        """The text of the only sample that became certain since the last call, and whether that is the end."""
        self._is_announced = False  # before anything is read: what comes from here on is announced again
        is_done = self.is_done
        return self._texts[0].take() if self._texts else "", is_done

    def take_pieces(self) -> list[Piece]:
        """What came of each sample since the last call, of those of which something did. Not to be mixed with `take`.

        A sample that has ended is told of once more, and then no longer.
        """
        self._is_announced = False  # as in `take`
        return [piece for index in list(self._num_told) if self._texts and (piece := self._piece(index)) is not None]

    def _piece(self, index: int) -> Piece | None:
        request, text, told = self.samples[index], self._texts[index], self._num_told[index]
        known = text.known
        new_text = text.take()
        if known.num_tokens == told and not new_text and not known.has_ended:
            return None
        first = request.num_prompt_tokens
        token_ids = request.token_ids[first + told : first + known.num_tokens]
        logprobs = None if request.sampling.logprobs is None else request.logprobs[told : known.num_tokens]
        if not known.has_ended:
            self._num_told[index] = known.num_tokens
            return Piece(index, new_text, token_ids, logprobs)
        del self._num_told[index]
        return Piece(index, new_text, token_ids, logprobs, request.finish_reason, request.error)

    def check(self) -> None:
        """Raises what the only sample ended with, if that is an error."""
        if self.error is not None:
            raise self.error
        (sample,) = self.samples
        if sample.error is not None:
            raise sample.error

    def output(self) -> RequestOutput:
        """What the prompt gave; raises the error if there is one. It must be done."""
        if self.error is not None:
            raise self.error
        return request_output(self.samples, [text.text for text in self._texts], self.prompt, self.index)


class Inbox:
    """The receiver for a thread that waits.

    Args:
        wants_stats: see `Receiver`. Only the newest are kept.
    """

    def __init__(self, wants_stats: bool = False) -> None:
        self.wants_stats = wants_stats
        self._stats: EngineStats | None = None
        self._events: SimpleQueue[Sequence[Ticket]] = SimpleQueue()

    def notify(self, tickets: Sequence[Ticket]) -> None:
        self._events.put(tickets)

    def show(self, stats: EngineStats) -> None:
        is_waited_for, self._stats = self._stats is None, stats
        if is_waited_for:
            self._events.put(())

    def wait(self) -> Sequence[Ticket]:
        """Waits for news: tickets to look at, or none if there are new statistics."""
        return self._events.get()

    def has_news(self) -> bool:
        """Whether `wait` would return at once."""
        return not self._events.empty()

    def take_stats(self) -> EngineStats | None:
        """The newest statistics since the last call."""
        stats, self._stats = self._stats, None
        return stats


def notify(receiver: Receiver | None, tickets: Sequence[Ticket], abort: Callable[[Sequence[Ticket]], object]) -> None:
    """Tells the receiver, if there is one, and aborts the tickets of one that cannot be told."""
    if receiver is None:
        return
    try:
        receiver.notify(tickets)
    except Exception as error:  # such as an asyncio loop that was closed under its tasks
        log.warning("nobody is there for %d answers any more, they are aborted: %s", len(tickets), error)
        abort(tickets)
