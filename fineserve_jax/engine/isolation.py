"""Which requests make steps fail: found by serving those of a failed step apart from others, in ever smaller groups.

    a step of a b c d fails       serve a b, then c d; then all
    a step of c d fails           serve c, then d; then all
    d fails alone, and again      d is what makes steps fail; all others go on

A group has passed when each of its requests has got a token, or has ended. So a failure that does not come again costs
some tokens that are computed again, and nobody's answer. Where requests pass in groups and fail together again and
again, as when memory is short for all of them, fewer run at a time, until nothing has failed for long.
"""

from collections import Counter
from collections.abc import Collection, Iterable

from fineserve_jax.request.request import Request

FAILURES_TO_HALVE = 3
"""Failures of which no request turned out to be the cause, until fewer run at a time."""
CALM_STEPS = 1000
"""Steps without a failure after which those before are forgotten, and as many run at a time as at first."""


class Isolation:
    """Decides who is served after steps that failed.

    Args:
        max_retries: how often a request that has failed alone is tried again. One that gets a token begins anew.

    Attributes:
        row_limit: most requests that are to run at a time; None: as many as the engine's own limit says.
    """

    def __init__(self, max_retries: int = 1) -> None:
        self._max_retries = max_retries
        self._groups: list[list[Request]] = []  # the last is being served
        self._failed_alone: Counter[Request] = Counter()
        self._unexplained = self._calm_steps = 0
        self.row_limit: int | None = None

    @property
    def served(self) -> list[Request] | None:
        """The only requests to be served now; None: all are."""
        return self._groups[-1] if self._groups else None

    def note_failure(self, suspects: Collection[Request]) -> Request | None:
        """A step failed that was to compute these requests, at least one; who is to be ended for it, if anybody."""
        self._calm_steps = 0
        if not self._groups:
            self._note_unexplained(len(suspects))
        others = [request for request in self._groups.pop() if request not in suspects] if self._groups else []
        if others:
            self._groups.append(others)
        group = list(suspects)
        if len(group) > 1:
            half = len(group) // 2
            self._groups += [group[half:], group[:half]]
            return None
        (request,) = group
        self._failed_alone[request] += 1
        if self._failed_alone[request] > self._max_retries:
            del self._failed_alone[request]
            self._unexplained = 0
            return request
        self._groups.append(group)
        return None

    def _note_unexplained(self, num_running: int) -> None:
        self._unexplained += 1
        if self._unexplained > FAILURES_TO_HALVE and num_running > 1:
            self.row_limit, self._unexplained = num_running // 2, 0

    def note_progress(self, requests: Iterable[Request]) -> bool:
        """These requests got a token in a step, or have ended; whether others are to be served now, or more."""
        if not self._groups:
            return self._note_calm()
        passed = set(requests)
        for request in passed:
            self._failed_alone.pop(request, None)
        *waiting, served = ([request for request in group if request not in passed] for group in self._groups)
        self._groups = [group for group in (*waiting, served) if group]
        return not served

    def _note_calm(self) -> bool:
        """A step of all requests did not fail; whether more may run at a time now."""
        self._calm_steps += 1
        if self._calm_steps < CALM_STEPS:
            return False
        had_limit = self.row_limit is not None
        self._unexplained, self._calm_steps, self.row_limit = 0, 0, None
        return had_limit
