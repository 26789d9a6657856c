"""Back-pressure: how many requests may wait, and for how long, before further ones are told to come again."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from fineserve_jax.engine.async_loop import AsyncLoop
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.entrypoints.server.classes import ServiceClass
from fineserve_jax.entrypoints.server.errors import ApiError

LONGEST_RETRY_S = 3600


class Pressure:
    """The requests that the server has in the engine. All methods are called on the event loop's thread.

    Args:
        loop: that serves them.
        max_waiting: most samples that wait for memory.
        max_wait_s: predicted seconds of waiting from which on nobody else is let in.
    """

    def __init__(self, loop: AsyncLoop, max_waiting: int, max_wait_s: float) -> None:
        self._loop, self._max_waiting, self._max_wait_s = loop, max_waiting, max_wait_s
        self._tickets: dict[Ticket, None] = {}
        self._of_class: Counter[str] = Counter()

    @contextlib.contextmanager
    def admitted(self, tickets: Sequence[Ticket], name: str, service_class: ServiceClass | None) -> Iterator[None]:
        """Lets the tickets of a request in, and counts them until they have ended.

        Args:
            name, service_class: of who asks.

        Raises:
            ApiError: with status 429 and when to come again: too many wait, it would take too long, or the class has
                as many requests as it may.
        """
        most = None if service_class is None else service_class.max_requests
        if most is not None and self._of_class[name] >= most:
            raise _come_again(f"this key has {most} requests, and may have no more at once; wait for one", 1.0)
        self._check(tickets)
        self._of_class[name] += 1
        self._tickets |= dict.fromkeys(tickets)
        try:
            yield
        finally:
            self._of_class[name] -= 1
            for ticket in tickets:
                del self._tickets[ticket]

    def wait_s(self, priority: int = 0) -> float:
        """Predicted seconds until a request of that priority that comes now has memory."""
        return self._loop.forecast(self._tickets, None, priority).wait_s

    def _check(self, tickets: Sequence[Ticket]) -> None:
        priority = min(ticket.prepared.options.priority for ticket in tickets)
        num_waiting, wait_s = self._loop.forecast(self._tickets, tickets[0].prepared.served.name, priority)
        num_own = sum(ticket.prepared.sampling.n for ticket in tickets)
        if num_waiting + num_own <= 0:
            return
        if num_waiting + num_own > self._max_waiting:
            raise _come_again(f"{max(num_waiting, 0)} requests wait, and {self._max_waiting} may", wait_s)
        if wait_s > self._max_wait_s:
            message = f"it would take {wait_s:.0f} s to begin, and the server lets in what begins within"
            raise _come_again(f"{message} {self._max_wait_s:g} s", wait_s - self._max_wait_s)


def _come_again(message: str, seconds: float) -> ApiError:
    wait = min(max(1, math.ceil(seconds)), LONGEST_RETRY_S)
    headers = {"Retry-After": str(wait)}
    return ApiError(f"{message}; come again in {wait} s", "rate_limit_exceeded", 429, headers)
