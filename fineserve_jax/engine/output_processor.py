"""What becomes of requests: their texts grow by the tokens that steps sample, and they end."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from fineserve_jax.engine.endings import dead_end, ending_with
from fineserve_jax.engine.nonfinite import nonfinite_message
from fineserve_jax.engine.request_text import RequestText
from fineserve_jax.errors import FineServeError, NonFiniteError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import FinishReason, Request, RequestStatus, SchedulerOutput
from fineserve_jax.runner.results import SampledToken, StepResult
from fineserve_jax.scheduler import Scheduler

T = TypeVar("T")


class OutputProcessor:
    """Gives requests what steps computed for them.

    Args:
        kv, scheduler: of the engine.
        clock: seconds, monotonic.

    Attributes:
        texts: the text of each request, until it is released.
    """

    def __init__(self, kv: KVManager, scheduler: Scheduler, clock: Callable[[], float]) -> None:
        self._kv, self._scheduler, self._clock = kv, scheduler, clock
        self.texts: dict[Request, RequestText] = {}

    def process(self, output: SchedulerOutput, result: StepResult) -> list[Request]:
        """Commits a step that was computed; the requests that got a token, or ended for want of one, or wanted none.

        What it gave for requests that ended before is left aside.
        """
        # Before their tokens count as computed: no page with NaN in it is ever shared.
        failed: list[Request] = []
        for request, stage in _unfinished(result.nonfinite):
            named = request.sampling.logits_processors
            message = nonfinite_message(request.model, request.num_output_tokens, stage, named)
            self.fail(request, NonFiniteError(message))
            failed.append(request)
        for request, reason in _unfinished(result.stuck):
            self.fail(request, dead_end(request, reason))
            failed.append(request)
        for request, scores in result.scores.items():
            if request.scores is not None and request not in result.nonfinite:
                request.scores.entries.extend(scores)
                if request.scores.hidden is not None:
                    request.scores.hidden.append(result.hidden[request])
        for chunk in output.chunks:
            pooling = chunk.request.pooling
            if pooling is not None and chunk.request in result.pooled and chunk.request not in result.nonfinite:
                pooling.count += len(pooling.wanted(chunk.start, chunk.start + chunk.count))
                pooling.total = pooling.total + result.pooled[chunk.request]
        sampled: dict[Request, list[SampledToken]] = {}
        for token in result.tokens:
            sampled.setdefault(token.request, []).append(token)
        for chunk in output.decodes:
            if chunk.drafts and chunk.request in sampled:
                self._scheduler.note_drafts(chunk, len(sampled[chunk.request]) - 1)
        tokens = [sampled[chunk.request][0].token if chunk.request in sampled else -1 for chunk in output.chunks]
        advanced = self._scheduler.commit(output, tokens, self._clock())
        for request in advanced:
            if request not in sampled:
                self.finish(request, FinishReason.LENGTH)  # it wanted no tokens
                continue
            first, *behind_drafts = sampled[request]
            self._append(request, first)
            for token in behind_drafts:
                if self._scheduler.commit_draft(request, token.token):
                    self._append(request, token)
        return [*advanced, *failed]

    def _append(self, request: Request, sampled: SampledToken) -> None:
        """Adds a sampled token to the request's text, and ends the request if that is its end.

        One that has just become long is computed again: all its tokens are turned by other factors from now on.
        """
        if sampled.logprobs is not None:
            request.logprobs.append(sampled.logprobs)
        text = self.texts[request]
        ending = ending_with(request, text, sampled.token)
        if isinstance(ending, FineServeError):
            self.fail(request, ending)
        elif ending is not None:
            self.finish(request, ending)
        else:
            text.accept()
            if request.is_long and request.num_tokens - 1 == request.long_after:
                self._scheduler.restart(request)

    def fail(self, request: Request, error: FineServeError) -> None:
        """Ends a request because of an error, of which it tells."""
        request.error = error
        self.finish(request, FinishReason.ERROR)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """Ends a request; its pages are free."""
        request.kv_tokens = self._kv.tokens_by_format(request)
        request.finish_reason = reason  # from here on it has ended, whatever happens to the rest; see `roll_back`
        self.texts[request].end()
        if request.request_id in self._scheduler:
            self._scheduler.finish(request, reason, self._clock())
        else:
            self._note_end(request)  # it is kept waiting, see `Recovery.serve_only`

    def roll_back(self) -> list[Request]:
        """Takes back what is half done of each request; those that have not ended, in the order of arrival."""
        unfinished = []
        for request, text in self.texts.items():
            if request.finish_reason is None:
                text.roll_back()
                if request.matcher is not None:
                    request.matcher.begin_with(request.output_token_ids)
                request.error = None
                unfinished.append(request)
            else:
                text.end()
                self._note_end(request)
        return unfinished

    def _note_end(self, request: Request) -> None:
        """What the scheduler notes of a request that ends, for one that it does not know."""
        if request.times.finished_s is None:
            request.times.finished_s = self._clock()
        request.status, request.fork_of = RequestStatus.FINISHED, None


def _unfinished(found: Mapping[Request, T]) -> list[tuple[Request, T]]:
    return [(request, value) for request, value in found.items() if request.status is not RequestStatus.FINISHED]
