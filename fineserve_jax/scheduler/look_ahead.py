"""Looking ahead: the step behind one that is being computed, where it does not depend on what that one samples.

That is so while all running requests decode: each goes on by the token that it gets, whichever that is, and what is
computed of those that turn out to have ended is dropped. All else (admission, prompts, drafts, memory that somebody has
to give up) waits until the tokens are known.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.scheduler.growth import Growth
from fineserve_jax.scheduler.model_choice import ModelChoice
from fineserve_jax.scheduler.narrowing_policy import NarrowingPolicy
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.speculation import Speculation

UNKNOWN = 0
"""Token id that stands for one that is being sampled."""


class LookAhead:
    """Plans the step behind another one.

    Args:
        kv, running, narrowing, growth, model_choice, speculation: the scheduler's.
    """

    def __init__(
        self,
        kv: KVManager,
        running: RunningRequests,
        narrowing: NarrowingPolicy,
        growth: Growth,
        model_choice: ModelChoice,
        speculation: Speculation,
    ) -> None:
        self._kv, self._running, self._narrowing, self._growth = kv, running, narrowing, growth
        self._model_choice, self._speculation = model_choice, speculation

    def going_on(self, step: SchedulerOutput, anybody_waits: bool) -> list[ScheduledChunk]:
        """The chunks of a step whose requests all decode in the next one; none if there is more to decide.

        Args:
            step: that is being computed.
            anybody_waits: whether requests wait for the memory of those that end in it.
        """
        chunk_of = {chunk.request: chunk for chunk in step.chunks}
        if len(self._running) > len(chunk_of) or any(running.request not in chunk_of for running in self._running):
            return []
        chunks = [chunk_of[running.request] for running in self._running]
        if any(chunk.start + chunk.count < chunk.request.num_tokens for chunk in chunks):
            return []
        going_on = [chunk for chunk in chunks if chunk.request.num_tokens + 1 < chunk.request.max_total_tokens]
        if anybody_waits and len(going_on) < len(chunks):
            return []
        return going_on if all(self._is_certain(chunk) for chunk in going_on) else []

    def _is_certain(self, chunk: ScheduledChunk) -> bool:
        """Whether the request's next step computes one token, whatever it gets in this one: it has no drafts, and is
        not computed again as one that has become long."""
        request = chunk.request
        return not self._speculation.may_draft(request) and request.num_tokens != request.long_after

    def decodes(self, chunks: Sequence[ScheduledChunk], now: float) -> SchedulerOutput | None:
        """The step in which the requests of these chunks decode; None where somebody has to give way for its memory.
        To be called `as_if_computed`."""
        self._kv.begin_step()
        self._narrowing.begin_step()
        if not self._growth.grow_at_ease():
            return None
        self._model_choice.next(self._running, now)
        requests = (chunk.request for chunk in chunks)
        return SchedulerOutput(tuple(ScheduledChunk(r, r.num_computed_tokens, 1) for r in requests), ())


@contextmanager
def as_if_computed(chunks: Sequence[ScheduledChunk]) -> Iterator[None]:
    """Inside, the requests are as they will be when the step of these chunks is computed, each with a token more, which
    is `UNKNOWN`."""
    before: list[tuple[Request, int, int]] = []
    try:
        for chunk in chunks:
            request = chunk.request
            before.append((request, request.num_computed_tokens, request.num_tokens))
            request.num_computed_tokens = chunk.start + chunk.count
            request.token_ids.append(UNKNOWN)
        yield
    finally:
        for request, computed, known in before:
            request.num_computed_tokens = computed
            del request.token_ids[known:]
