"""When requests have to be complete: one that named a `deadline_s` ends when its time is over, wherever it is."""

import heapq
import math

from fineserve_jax.request.request import Request, RequestStatus


class Deadlines:
    """Requests by when they have to be complete. Those that have ended are forgotten when their time comes."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Request]] = []

    def add(self, request: Request) -> None:
        """Keeps an eye on a request, if it has a deadline."""
        if request.options.deadline_s is not None:
            due_s = request.times.arrival_s + request.options.deadline_s
            heapq.heappush(self._heap, (due_s, request.sequence, request))

    @property
    def next_s(self) -> float:
        """When the next is due of those that have not ended, by the engine's clock; infinite if there is none."""
        while self._heap and self._heap[0][-1].status is RequestStatus.FINISHED:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def take_overdue(self, now: float) -> list[Request]:
        """Those that have not ended, and were due; each is named once."""
        overdue = []
        while self.next_s <= now:
            overdue.append(heapq.heappop(self._heap)[-1])
        return overdue
