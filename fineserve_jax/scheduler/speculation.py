"""Speculation without a second model: whose decodes get drafts in a step, and how many, so that they pay.

A draft goes through a decode row of its own and saves a step if it is what is sampled in its place. Whether it is
depends on the text; what it costs, on the device. So each request's share of accepted drafts is followed, and a step
gets as many as give the most tokens a second by the step profile: none, if that is what it says.

    gain of a request's d-th draft = p^d          p: its share of accepted drafts, of those with none refused ahead
    tokens of a step               = rows + gains
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from fineserve_jax.request.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.scheduler.costs import StepCost, step_cost
from fineserve_jax.scheduler.drafting import Drafting
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.running_request import RunningRequest


class Speculation:
    """Gives decodes drafts.

    Args:
        most: drafts of a decode at most; 0: none ever.
        row_sizes: of each model the numbers of rows that its steps are padded to, ascending.

    Attributes:
        row_sizes: as given; models may come and go.
        num_drafts, num_accepted: drafts that were computed and those that were accepted, since the start.
    """

    def __init__(self, most: int = 0, row_sizes: Mapping[str, Sequence[int]] | None = None) -> None:
        self._most, self.row_sizes = most, dict(row_sizes or {})
        self.num_drafts = self.num_accepted = 0

    def with_drafts(self, output: SchedulerOutput, running: RunningRequests, profile: StepProfile) -> SchedulerOutput:
        """The step with drafts for some of its decodes, if it has nothing else and they pay."""
        if not self._most or output.prefills:
            return output
        found = [self._find(chunk, running) for chunk in output.decodes]
        if not any(drafts for _, drafts in found):
            return output
        counts = self._counts(output.decodes, [(own.share, len(drafts)) for own, drafts in found], profile)
        decodes = []
        for chunk, (drafting, drafts), count in zip(output.decodes, found, counts, strict=True):
            if drafts and not count:
                drafting.fade()
            decodes.append(replace(chunk, drafts=drafts[:count]) if count else chunk)
        return SchedulerOutput(tuple(decodes), ())

    def may_draft(self, request: Request) -> bool:
        """Whether its decodes may ever have drafts."""
        return request.allows_drafts and self._most_asked(request) > 0

    def note(self, running: RunningRequest, offered: int, accepted: int) -> None:
        """Learn from a decode's drafts, of which the first so many were accepted."""
        self.num_drafts += offered
        self.num_accepted += accepted
        if running.drafting is not None:
            running.drafting.note(offered, accepted)

    def padded(self, cost: StepCost, model: str) -> StepCost:
        """The cost of a step that only decodes with all its rows counted, those that pad it too: what its time goes by,
        where a row more may cost nothing or as much as all before it."""
        return replace(cost, tokens=self._size(cost.tokens, model)) if self._most else cost

    def _size(self, rows: int, model: str) -> int:
        return next((size for size in self.row_sizes[model] if size >= rows), rows)

    def _find(self, chunk: ScheduledChunk, running: RunningRequests) -> tuple[Drafting, tuple[int, ...]]:
        request, own = chunk.request, running.get(chunk.request)
        assert own is not None, "who decodes is running"
        if own.drafting is None:
            own.drafting = Drafting(request.token_ids)
        most = self._most_of(own, chunk.start)
        return own.drafting, own.drafting.lookup.find(most) if most > 0 else ()

    def _most_of(self, running: RunningRequest, start: int) -> int:
        """Drafts that a decode of the token at `start` may have: they lie in that token's page, which the request has,
        and no token is sampled beyond its greatest length, nor drafted where its positions are turned otherwise."""
        request, own = running.request, running.page_class
        if not request.allows_drafts:
            return 0
        most = self._most_asked(request)
        # A page that is encoded as a whole is so when its last token is computed, and that must not be in doubt.
        in_page = own.page_size - 1 - start % own.page_size - (own.residual is not None)
        known = start + 1
        if request.long_after is not None and not request.is_long:
            most = min(most, request.long_after - known)
        return min(most, in_page, request.max_total_tokens - known - 1)

    def _most_asked(self, request: Request) -> int:
        asked = request.options.num_speculative_tokens
        return self._most if asked is None else min(asked, self._most)

    def _counts(
        self, decodes: Sequence[ScheduledChunk], offers: Sequence[tuple[float, int]], profile: StepProfile
    ) -> list[int]:
        """How many drafts each decode gets, given the share that is accepted and how many there are."""
        model, formats = decodes[0].request.model, profile.model.formats
        gains = sorted(
            ((share**depth, row) for row, (share, count) in enumerate(offers) for depth in range(1, count + 1)),
            key=lambda gain: -gain[0],
        )
        cost, tokens, chosen = step_cost(decodes, formats), float(len(decodes)), 0
        best = tokens / profile.predict(self.padded(cost, model))
        for number, (gain, row) in enumerate(gains[: self.row_sizes[model][-1] - len(decodes)], 1):
            start, own = decodes[row].start, formats[decodes[row].request.kv_precision]
            cost, tokens = cost + StepCost(1, 0, start * own.bytes_per_token, start), tokens + gain
            rate = tokens / profile.predict(self.padded(cost, model))
            if rate > best:
                best, chosen = rate, number
        counts = [0] * len(decodes)
        for _, row in gains[:chosen]:
            counts[row] += 1
        return counts
