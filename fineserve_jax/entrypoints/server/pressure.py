"""Back-pressure: how many requests may wait, and for how long, before further ones are told to come again."""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence

from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.entrypoints.server.classes import ServiceClass
from fineserve_jax.entrypoints.server.errors import ApiError
from fineserve_jax.request.request import RequestStatus
from fineserve_jax.scheduler import Scheduler
from fineserve_jax.scheduler.waits import Ahead

LONGEST_RETRY_S = 3600


class Pressure:
    """The requests that the server has in the engine. All methods are called on the event loop's thread.

    Args:
        scheduler: of the engine; only what any thread may read is read.
        max_waiting: most samples that wait for memory.
        max_wait_s: predicted seconds of waiting from which on nobody else is let in.
    """

    def __init__(self, scheduler: Scheduler, max_waiting: int, max_wait_s: float) -> None:
        self._scheduler, self._max_waiting, self._max_wait_s = scheduler, max_waiting, max_wait_s
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
        return self._scheduler.waits.wait_s(self._ahead(priority), self._scheduler.is_short)

    def _check(self, tickets: Sequence[Ticket]) -> None:
        ahead = self._ahead(min(ticket.prepared.options.priority for ticket in tickets))
        waits, is_short = self._scheduler.waits, self._scheduler.is_short
        num_waiting = len(ahead) - waits.places(ahead, is_short)
        num_own = sum(ticket.prepared.sampling.n for ticket in tickets)
        if num_waiting + num_own <= 0:
            return
        wait_s = waits.wait_s(ahead, is_short)
        if num_waiting + num_own > self._max_waiting:
            raise _come_again(f"{max(num_waiting, 0)} requests wait, and {self._max_waiting} may", wait_s)
        if wait_s > self._max_wait_s:
            message = f"it would take {wait_s:.0f} s to begin, and the server lets in what begins within"
            raise _come_again(f"{message} {self._max_wait_s:g} s", wait_s - self._max_wait_s)

    def _ahead(self, priority: int) -> list[Ahead]:
        """What is ahead of a request of that priority."""
        waits, ahead = self._scheduler.waits, []
        for ticket in self._tickets:
            if ticket.is_done:
                continue
            prepared, samples = ticket.prepared, ticket.samples
            if samples:
                left = [sample for sample in samples if sample.status is not RequestStatus.FINISHED]
                listed = [waits.ahead(sample) for sample in left]
            else:
                prompt = len(prepared.token_ids)
                newcomer = waits.newcomer(
                    prepared.served.name, prepared.options.tenant, prompt, prepared.max_total_tokens - prompt
                )
                listed = [newcomer] * prepared.sampling.n
            is_ahead = prepared.options.priority <= priority
            ahead += [one for one in listed if one.has_place or is_ahead]
        return ahead


def _come_again(message: str, seconds: float) -> ApiError:
    wait = min(max(1, math.ceil(seconds)), LONGEST_RETRY_S)
    headers = {"Retry-After": str(wait)}
    return ApiError(f"{message}; come again in {wait} s", "rate_limit_exceeded", 429, headers)
