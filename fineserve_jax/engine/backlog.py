"""What an engine has to do for tickets that it was given or is about to be, and how long others would wait for it."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.request.request import RequestStatus
from fineserve_jax.scheduler.waits import Ahead, WaitPredictor


class Predictions(Protocol):
    """What predictions are made from; `Scheduler` is one.

    Attributes:
        waits: predicts.
        is_short: see `Scheduler.is_short`.
    """

    @property
    def waits(self) -> WaitPredictor: ...

    @property
    def is_short(self) -> bool: ...


class Forecast(NamedTuple):
    """What a request that comes now has to expect.

    Attributes:
        num_waiting: requests that wait for a place ahead of it; less than 0: so many places are free.
        wait_s: predicted seconds until it has memory.
    """

    num_waiting: int
    wait_s: float


def forecast(scheduler: Predictions, tickets: Iterable[Ticket], priority: int = 0) -> Forecast:
    """What a request of that priority has to expect behind these tickets. May be called by any thread."""
    waits, is_short = scheduler.waits, scheduler.is_short
    ahead = ahead_of(waits, tickets, priority)
    return Forecast(len(ahead) - waits.places(ahead, is_short), waits.wait_s(ahead, is_short))


def ahead_of(waits: WaitPredictor, tickets: Iterable[Ticket], priority: int) -> list[Ahead]:
    """Those samples of these tickets that are ahead of a request of that priority."""
    ahead: list[Ahead] = []
    for ticket in tickets:
        if ticket.is_done:
            continue
        prepared, samples = ticket.prepared, ticket.samples
        if samples:
            listed = [waits.ahead(sample) for sample in samples if sample.status is not RequestStatus.FINISHED]
        else:
            prompt = len(prepared.token_ids)
            newcomer = waits.newcomer(
                prepared.served.name, prepared.options.tenant, prompt, prepared.max_total_tokens - prompt
            )
            listed = [newcomer] * prepared.sampling.n
        is_ahead = prepared.options.priority <= priority
        ahead += [one for one in listed if one.has_place or is_ahead]
    return ahead
