"""The waiting queue: heaps for each (model, KV format), and with quotas for each tenant besides, since requests of one
group fail for want of the same memory. An admission pass looks at the groups' heads only, so it costs nothing for the
thousands behind a head that cannot be admitted.

Requests are ordered by

    priority    smaller numbers first, whatever the policy and the targets
    rank        in one priority, requests whose first token can still be in time come before those that *missed the
                deadline*, which stay in the order of arrival
    key         the policy's; ties go to the earlier arrival

There is a last resort: a request that has waited for `overtaking_limit_s` is *aged*, and comes before all that are not,
whatever its priority and however late it is; only those that quotas guarantee memory to come before it (see `quotas`).
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, TypeVar

from fineserve_jax.request.request import Request, RequestStatus
from fineserve_jax.scheduler.policies import SortKey

Group: TypeAlias = tuple[str, ...]
_Item = TypeVar("_Item", bound=tuple[Any, ...])
AGED, ON_TIME, DEADLINE_MISSED = -1, 0, 1


class Entry(NamedTuple):
    """A waiting request as it compares with others.

    Attributes:
        priority: the request's; -inf for an aged one.
        rank: AGED, ON_TIME or DEADLINE_MISSED.
        key: the policy's; time of arrival for one that is not ON_TIME.
        sequence: distinct.
    """

    priority: float
    rank: int
    key: SortKey
    sequence: int
    request: Request


@dataclass(slots=True)
class _Heaps:
    """Entries of one group; those that are no longer so are dropped when they come to the top.

    Attributes:
        on_time: requests in the order of priority and policy.
        missed: requests that missed their deadline, in the order of priority and arrival.
        by_arrival: all requests by sequence.
        ageing: on-time requests by sequence, until they are found to be overdue.
        overdue: on-time requests that were, by priority and sequence.
    """

    on_time: list[Entry] = field(default_factory=list)
    missed: list[Entry] = field(default_factory=list)
    by_arrival: list[tuple[int, Request]] = field(default_factory=list)
    ageing: list[tuple[int, Request]] = field(default_factory=list)
    overdue: list[tuple[int, int, Request]] = field(default_factory=list)
    num_waiting: int = 0


class WaitingQueue:
    """Requests in the order of a policy.

    Args:
        key_of: a request's sort key; asked once, when the request is pushed.
        latest_start_of: time at which a request has to be admitted for its first token to be in time.
        overtaking_limit_s: seconds from its arrival after which a request is first of all.
        group_of: a request's group; None: its model and KV format.
    """

    def __init__(
        self,
        key_of: Callable[[Request], SortKey],
        latest_start_of: Callable[[Request], float] = lambda request: math.inf,
        overtaking_limit_s: float = math.inf,
        group_of: Callable[[Request], Group] | None = None,
    ) -> None:
        self._key_of, self._latest_start_of, self._overtaking_limit_s = key_of, latest_start_of, overtaking_limit_s
        self.group_of = group_of or model_and_format
        self._ranks: dict[Request, int] = {}  # ON_TIME or DEADLINE_MISSED
        self._heaps: dict[Group, _Heaps] = {}
        self._by_latest_start: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._ranks)

    def groups(self) -> list[Group]:
        """Groups in which a request waits, in the order in which they were first seen."""
        return list(self._heaps)

    def push(self, request: Request) -> None:
        """Let a request wait."""
        request.status = RequestStatus.WAITING
        heaps = self._heaps.setdefault(self.group_of(request), _Heaps())
        sequence = request.sequence
        heapq.heappush(
            heaps.on_time, Entry(request.options.priority, ON_TIME, self._key_of(request), sequence, request)
        )
        heapq.heappush(heaps.by_arrival, (sequence, request))
        heapq.heappush(heaps.ageing, (sequence, request))
        self._ranks[request] = ON_TIME
        heaps.num_waiting += 1
        latest_start = self._latest_start_of(request)
        if latest_start < math.inf:
            heapq.heappush(self._by_latest_start, (latest_start, sequence, request))
        self._compact(heaps)

    def remove(self, request: Request) -> None:
        """Forget a request, which has been admitted or has ended."""
        del self._ranks[request]
        group = self.group_of(request)
        self._heaps[group].num_waiting -= 1
        if not self._heaps[group].num_waiting:
            del self._heaps[group]

    def defer_missed(self, now: float) -> list[Request]:
        """Put requests that cannot start in time any more behind the others of their priority.

        Returns:
            those that missed their deadline since the last call.
        """
        missed, starts = [], self._by_latest_start
        while starts and starts[0][0] < now:
            _, sequence, request = heapq.heappop(starts)
            if self._ranks.get(request) != ON_TIME:
                continue
            # Asked again: it may have got its first token and lost its memory since, or steps have become faster.
            latest_start = self._latest_start_of(request)
            if now <= latest_start < math.inf:
                heapq.heappush(starts, (latest_start, sequence, request))
            elif latest_start < now:
                self._ranks[request] = DEADLINE_MISSED
                entry = Entry(request.options.priority, DEADLINE_MISSED, request.times.arrival_s, sequence, request)
                heapq.heappush(self._heaps[self.group_of(request)].missed, entry)
                missed.append(request)
        return missed

    def head(self, group: Group, now: float = -math.inf) -> Entry | None:
        """The group's first request."""
        heaps = self._heaps.get(group)
        if heaps is None:
            return None
        oldest = self._oldest(heaps)
        if now - oldest.times.arrival_s >= self._overtaking_limit_s:
            return Entry(-math.inf, AGED, oldest.times.arrival_s, oldest.sequence, oldest)
        on_time, missed = self._top(heaps.on_time, ON_TIME), self._top(heaps.missed, DEADLINE_MISSED)
        if on_time is None or missed is None:
            return missed if on_time is None else on_time
        return min(on_time, missed)

    def overdue_priority(self, group: Group, now: float, ageing_s: float) -> float:
        """Smallest priority number among the group's requests that have waited as long as any should have to: those of
        on-time requests that have waited `ageing_s`, and -inf for aged ones. Without any: inf.
        """
        head = self.head(group, now)
        if head is None or head.rank == AGED:
            return math.inf if head is None else -math.inf
        heaps = self._heaps[group]
        overdue, ageing = heaps.overdue, heaps.ageing
        while True:
            while overdue and self._ranks.get(overdue[0][-1]) != ON_TIME:
                heapq.heappop(overdue)
            # No number in the group is smaller than its head's. With one priority, a single request is moved.
            if (overdue and overdue[0][0] == head.priority) or not ageing:
                break
            sequence, request = ageing[0]
            if self._ranks.get(request) == ON_TIME:
                if now - request.times.arrival_s < ageing_s:
                    break
                heapq.heappush(overdue, (request.options.priority, sequence, request))
            heapq.heappop(ageing)
        return overdue[0][0] if overdue else math.inf

    def _oldest(self, heaps: _Heaps) -> Request:
        while heaps.by_arrival[0][1] not in self._ranks:
            heapq.heappop(heaps.by_arrival)
        return heaps.by_arrival[0][1]

    def _top(self, heap: list[Entry], rank: int) -> Entry | None:
        while heap and self._ranks.get(heap[0].request) != rank:
            heapq.heappop(heap)
        return heap[0] if heap else None

    def _compact(self, heaps: _Heaps) -> None:
        """Rebuild heaps that are mostly stale, at a cost that the removals before have paid for."""
        limit = 2 * heaps.num_waiting + 64
        if len(heaps.on_time) > limit:
            heaps.on_time = self._live(heaps.on_time, ON_TIME)
        if len(heaps.missed) > limit:
            heaps.missed = self._live(heaps.missed, DEADLINE_MISSED)
        if len(heaps.by_arrival) > limit:
            heaps.by_arrival = self._live(heaps.by_arrival, ON_TIME, DEADLINE_MISSED)
        if len(heaps.ageing) > limit:
            heaps.ageing = self._live(heaps.ageing, ON_TIME)
        if len(heaps.overdue) > limit:
            heaps.overdue = self._live(heaps.overdue, ON_TIME)
        if len(self._by_latest_start) > 2 * len(self._ranks) + 64:
            self._by_latest_start = self._live(self._by_latest_start, ON_TIME)

    def _live(self, heap: list[_Item], *ranks: int) -> list[_Item]:
        """The entries of requests that wait with one of these ranks: each ends with its request."""
        # By request: one that was preempted and pushed again may be in it twice.
        live = list({item[-1]: item for item in heap if self._ranks.get(item[-1]) in ranks}.values())
        heapq.heapify(live)
        return live


def model_and_format(request: Request) -> Group:
    return (request.model, request.kv_precision)


def model_format_and_tenant(request: Request) -> Group:
    return (request.model, request.kv_precision, request.options.tenant)
