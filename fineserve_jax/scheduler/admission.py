"""Level 1: which waiting requests get memory.

An admission pass goes through the waiting requests in the queue's order: by priority, then whether the deadline can be
kept, then as the policy says. One that finds no memory stays WAITING and closes its own group (model and KV format) for
the rest of the pass, since whoever comes later in the group shall not overtake it; other groups go on, for their pool
may have room.

Overtaking has an end. Where pools share memory, cheap requests that keep coming could take each freed slab
before a request that needs more of them ever sees enough. So once a waiting request of a closed group has waited
`ageing_s`, the pass is closed to requests of the same or a less urgent priority that compete for the same memory, too:
memory then drains until the old request fits. Hence, under `fineserve` and `fcfs`:

    no request is admitted ahead of one that is at least as urgent, came more than `ageing_s` earlier and competes
    for its memory.

Requests that missed their deadline (see `waiting`), those of less urgent priorities, and those of other policies are
bound by `overtaking_limit_s` in its place.

(At that moment the older one has waited over `ageing_s`, and comes first in the queue's order. In the same group it is
tried first; in another its group's head is, and the pass goes on only if nothing in that group was closed
before it.)

With quotas (see `quotas`) the requests that are under a guarantee come before all others, and tenants have groups of
their own.
"""

import math
from collections import Counter

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.page_pool import Demand
from fineserve_jax.scheduler.narrowing_policy import NarrowingPolicy
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.running_request import RunningRequest
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig
from fineserve_jax.scheduler.victims import Victims
from fineserve_jax.scheduler.waiting import Entry, Group, WaitingQueue


class Admission:
    """Goes through the waiting queue and admits what fits.

    Args:
        config: ageing.
        kv: gives the pages.
        queue: the waiting requests; admitted ones are removed from it.
        running: admitted ones are added to it.
        narrowing: makes room by narrowing pages of running requests.
        quotas: who is under a guarantee, and who may have no more.
        victims: who gives way to requests under a guarantee.

    Attributes:
        num_reclaimed: requests that were preempted for one under a guarantee, since the start.
        left_guaranteed: whether the last pass left a request without memory that it was guaranteed.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        queue: WaitingQueue,
        running: RunningRequests,
        narrowing: NarrowingPolicy,
        quotas: Quotas,
        victims: Victims,
    ) -> None:
        self._config, self._kv, self._queue, self._running = config, kv, queue, running
        self._narrowing, self._quotas, self._victims = narrowing, quotas, victims
        self._num_passes = 0
        self.num_reclaimed = 0
        self.left_guaranteed = False

    def admit(self, now: float, most: int) -> list[RunningRequest]:
        """One admission pass: admit requests as memory and batch slots allow.

        Args:
            now: engine clock.
            most: requests that may hold memory at once.

        Returns:
            The admitted requests in the order of admission, each holding the pages of all its known tokens. Every
            request that competes with one of them can still grow by the reserve.
        """
        self._num_passes += 1
        self.left_guaranteed = False
        # Each open group, and the priority number from which on it is closed.
        open_groups = dict.fromkeys(self._queue.groups(), math.inf)
        # Batch slots of requests that are preempted here for memory are filled in the next pass.
        num_free_slots = most - len(self._running)
        admitted: list[RunningRequest] = []
        while open_groups and (entry := self._first(open_groups, now)):
            request, group = entry.request, self._queue.group_of(entry.request)
            joining = self.joining(entry)
            guaranteed = self._quotas.is_under_guarantee(request)
            if not self._quotas.admits(request, joining.page_class):
                del open_groups[group]
                continue
            if len(admitted) >= num_free_slots:
                if not (guaranteed and self._reclaim(joining)):
                    break
                num_free_slots += 1
            if self._grow(joining, guaranteed):
                self._queue.remove(request)
                self._quotas.note(request)
                joining.note_growth()
                self._running.reserve.add(joining)
                admitted.append(joining)
            elif guaranteed:
                self.left_guaranteed = True  # pages are being moved together for it; nobody shall take them meanwhile
                break
            else:
                self._close(joining, open_groups, now)
        # Only now, so that nobody who was admitted in this pass gives way or is narrowed in it.
        for joining in admitted:
            self._running.add(joining)
        return admitted

    def joining(self, entry: Entry) -> RunningRequest:
        """A waiting request as it would be admitted in this pass; it holds nothing yet."""
        page_class = self._kv.class_of(entry.request.model, entry.request.kv_precision)
        return RunningRequest(entry.request, page_class, self._kv.share_names(page_class), self._num_passes, entry)

    def _first(self, open_groups: dict[Group, float], now: float) -> Entry | None:
        """The first request in the queue's order that is not closed out, those under a guarantee before all others."""
        heads = [
            head
            for group, closed_from in open_groups.items()
            if (head := self._queue.head(group, now)) is not None and head.priority < closed_from
        ]
        guaranteed = [head for head in heads if self._quotas.is_under_guarantee(head.request)]
        return min(guaranteed or heads, default=None)

    def _grow(self, joining: RunningRequest, guaranteed: bool) -> bool:
        """Give a request its pages if that leaves the reserve; one alone in its memory needs none. To one under a
        guarantee others give way, and the reserve if need be."""
        request, leaving = joining.request, self._running.reserve.beside(joining)
        while not self._kv.grow(request, request.num_tokens, leaving):
            if self._kv.is_compacting:
                return False  # what is free has only to be moved together, in the next steps
            if self._narrowing_may_help(joining, leaving) and self._narrowing.narrow(joining.shares):
                continue
            if not (guaranteed and self._reclaim(joining)):
                return guaranteed and self._kv.grow(request, request.num_tokens)
            leaving = self._running.reserve.beside(joining)
        return True

    def _reclaim(self, joining: RunningRequest) -> bool:
        """Preempt a request for one under a guarantee; whether there was one to preempt."""
        victim = self._victims.for_guarantee(joining)
        if victim is None:
            return False
        self._running.preempt(victim)
        self.num_reclaimed += 1
        return True

    def _narrowing_may_help(self, joining: RunningRequest, leaving: Demand | None) -> bool:
        """Whether the request could have its pages if all that may be narrowed were; nothing is narrowed in vain."""
        if not self._narrowing.can_narrow:
            return False
        kv, request = self._kv, joining.request
        wanted = Counter(kv.demand(request, request.num_tokens))
        wanted.update(leaving or {})
        lacking = kv.lacking_units(wanted, 0 if leaving is None else kv.reserve_slabs)
        return lacking <= self._narrowing.most_units(joining.shares)

    def _close(self, joining: RunningRequest, open_groups: dict[Group, float], now: float) -> None:
        """Close the group of a request that found no memory, and if need be those that compete with it, from the
        priority of the most urgent of its group that has waited too long."""
        own = self._queue.group_of(joining.request)
        del open_groups[own]
        closed_from = self._queue.overdue_priority(own, now, self._config.ageing_s)
        if closed_from == math.inf:
            return
        for group in list(open_groups):
            if joining.shares.isdisjoint(self._shares(group)):
                continue
            head = self._queue.head(group, now)
            if head is None or head.priority >= closed_from:
                del open_groups[group]
            else:
                open_groups[group] = min(open_groups[group], closed_from)

    def _shares(self, group: Group) -> frozenset[str]:
        model, kv_format = group[:2]
        return self._kv.share_names(self._kv.class_of(model, kv_format))
