"""An engine of several as the router sees it: what it serves, what it has to do, what a further request would get."""

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

from fineserve_jax.engine.backlog import Predictions, ahead_of
from fineserve_jax.engine.engine_config import EngineConfig
from fineserve_jax.engine.intake import Intake
from fineserve_jax.engine.prepare import PreparedRequest
from fineserve_jax.engine.scoring import check_branches
from fineserve_jax.engine.ticket_loop import TicketLoop
from fineserve_jax.engine.tickets import Ticket
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler.router import Asked, Outlook, Queue, Waiting
from fineserve_jax.scheduler.waits import Ahead

KEPT = ("scored_from", "branches", "pooled_from", "arrival_s")
"""What engines do not set when they prepare a request, and which therefore goes along with one that another serves."""


class KnownEngine(Intake, Protocol):
    """What is known of an engine, whether it is in this process or in another one."""

    @property
    def config(self) -> EngineConfig: ...

    @property
    def kv(self) -> KVManager: ...

    @property
    def scheduler(self) -> Predictions: ...


class ReplicaLoop(TicketLoop, Protocol):
    """The loop of one engine.

    Attributes:
        is_up: whether the engine is there; else it is being replaced, and what is submitted waits for that.
    """

    @property
    def is_up(self) -> bool: ...

    @property
    def engine(self) -> KnownEngine: ...

    def withdraw(self, ticket: Ticket) -> float | None:
        """See `EngineLoop.withdraw`."""


class EngineReplica:
    """An engine, on whose thread it is, and the tickets that were sent to it. Any thread may call it; who changes what
    was sent holds the fleet's lock.

    Args:
        name: in the plan.
        loop: of the engine.
    """

    def __init__(self, name: str, loop: ReplicaLoop) -> None:
        self.name, self.loop, self.engine = name, loop, loop.engine
        self._sent: dict[Ticket, None] = {}

    @property
    def models(self) -> Collection[str]:
        return list(self.engine.models)

    @property
    def most_blocks(self) -> int:
        """Pages of the shortest class that fill the memory."""
        allocator = self.engine.kv.pool.allocator
        return allocator.usable_slabs * max((pool.capacity for pool in allocator.pools.values()), default=0)

    # -- what it has to do ---------------------------------------------------------------------------------------

    def note_sent(self, ticket: Ticket) -> None:
        """The ticket is about to be submitted."""
        self._sent[ticket] = None

    def forget(self, ticket: Ticket) -> None:
        """The ticket is no longer its own."""
        self._sent.pop(ticket, None)

    def tickets(self) -> list[Ticket]:
        """Those that are not done, in the order in which they were sent."""
        left = [ticket for ticket in list(self._sent) if not ticket.is_done]
        for ticket in [ticket for ticket in list(self._sent) if ticket.is_done]:
            self.forget(ticket)
        return left

    def ahead(self, priority: int, tickets: Iterable[Ticket] | None = None) -> list[Ahead]:
        """What is ahead of a request of that priority that comes now, or that comes behind these tickets."""
        return ahead_of(self.engine.scheduler.waits, self.tickets() if tickets is None else tickets, priority)

    # -- what it would give --------------------------------------------------------------------------------------

    def outlook(self, asked: Asked, cached_tokens: int) -> Outlook:
        """See `router.Replica`."""
        return self._outlook(asked, cached_tokens, self.ahead(asked.priority))

    def _outlook(self, asked: Asked, cached_tokens: int, ahead: Sequence[Ahead]) -> Outlook:
        waits, is_short = self.engine.scheduler.waits, self.engine.scheduler.is_short
        left = max(1, len(asked.token_ids) - cached_tokens)
        own = self._newcomer(asked)._replace(prefill_tokens=left, cached_tokens=len(asked.token_ids) - left)
        first_s, step_s = waits.first_token_s(ahead, own, is_short)
        return Outlook(first_s, step_s, len(ahead), cached_tokens)

    def output_tokens(self, asked: Asked) -> float:
        """See `router.Replica`."""
        return self._newcomer(asked).output_tokens

    def _newcomer(self, asked: Asked) -> Ahead:
        waits, tokens = self.engine.scheduler.waits, len(asked.token_ids)
        return waits.newcomer(asked.model, asked.tenant, tokens, asked.most_output_tokens)

    def queue(self, most: int) -> Queue[Ticket]:
        """The last of its tickets of which nothing was begun, at most so many, with what each would wait."""
        waits, is_short, tickets = self.engine.scheduler.waits, self.engine.scheduler.is_short, self.tickets()
        places = [place for place, ticket in enumerate(tickets) if is_short and ticket.has_not_begun]
        waiting = []
        for place in places[-most:]:
            ahead = self.ahead(tickets[place].prepared.options.priority, tickets[:place])
            waiting.append(Waiting(tickets[place], waits.wait_s(ahead, is_short)))
        return Queue(is_short, waiting)

    def wait_s(self, ticket: Ticket, num_before: int) -> float | None:
        """Predicted until a ticket begins that is moved here behind so many others like it; None: it does not serve
        its model, or is not there."""
        asked = asked_of(ticket.prepared)
        if asked.model not in self.models or not self.loop.is_up:
            return None
        ahead = self.ahead(asked.priority) + [self._newcomer(asked)] * num_before * ticket.prepared.sampling.n
        return self.engine.scheduler.waits.wait_s(ahead, self.engine.scheduler.is_short)


def asked_of(prepared: PreparedRequest) -> Asked:
    """A request as the router sees it."""
    options, length = prepared.options, len(prepared.token_ids)
    return Asked(
        model=prepared.served.name,
        kv_precision=prepared.precision.start,
        token_ids=prepared.token_ids,
        most_output_tokens=prepared.max_total_tokens - length,
        tenant=options.tenant,
        priority=options.priority,
        ttft_slo_s=options.ttft_slo_s,
        tpot_slo_s=options.tpot_slo_s,
    )


def prepared_by(
    engine: Intake,
    token_ids: Sequence[int],
    sampling: SamplingParams,
    options: RequestOptions,
    kept: Mapping[str, Any],
) -> PreparedRequest:
    """A request that was prepared elsewhere, as this engine serves it. `kept`: its fields `KEPT`. Raises `RequestError`
    if the engine does not."""
    own = dataclasses.replace(engine.prepare(token_ids, sampling, options, kept["pooled_from"]), **kept)
    check_branches(own)
    return own


def what_was_asked(prepared: PreparedRequest) -> tuple[list[int], SamplingParams, RequestOptions, dict[str, Any]]:
    """The arguments of `prepared_by` for another engine."""
    options = prepared.options.model_copy(update={"model": prepared.served.name})
    return prepared.token_ids, prepared.sampling, options, {name: getattr(prepared, name) for name in KEPT}
