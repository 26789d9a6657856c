"""Which requests make steps fail: found by serving those of a failed step apart from others, in ever smaller groups.

    a step of a b c d fails       serve a b, then c d; then all
    a step of c d fails           serve c, then d; then all
    d fails alone, and once more  d is what makes steps fail; all others go on

A group has passed when each of its requests has got a token, or has ended. So a failure that does not come again costs
some tokens that are computed again, and nobody's answer.
"""

from collections.abc import Collection, Iterable

from fineserve_jax.request import Request


class Isolation:
    """Decides who is served after steps that failed."""

    def __init__(self) -> None:
        self._groups: list[list[Request]] = []  # the last is being served
        self._failed_alone: set[Request] = set()

    @property
    def served(self) -> list[Request] | None:
        """The only requests to be served now; None: all are."""
        return self._groups[-1] if self._groups else None

    def note_failure(self, suspects: Collection[Request]) -> Request | None:
        """A step failed that was to compute these requests, at least one; who is to be ended for it, if anybody."""
        others = [request for request in self._groups.pop() if request not in suspects] if self._groups else []
        if others:
            self._groups.append(others)
        group = list(suspects)
        if len(group) > 1:
            half = len(group) // 2
            self._groups += [group[half:], group[:half]]
            return None
        (request,) = group
        if request in self._failed_alone:
            self._failed_alone.discard(request)
            return request
        self._failed_alone.add(request)
        self._groups.append(group)
        return None

    def note_progress(self, requests: Iterable[Request]) -> bool:
        """These requests got a token, or have ended; whether it is the next group's turn, or everybody's."""
        if not self._groups:
            return False
        passed = set(requests)
        self._failed_alone -= passed
        *waiting, served = ([request for request in group if request not in passed] for group in self._groups)
        self._groups = [group for group in (*waiting, served) if group]
        return not served
