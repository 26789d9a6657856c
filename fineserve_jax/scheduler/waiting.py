"""The waiting queue: heaps for each (model, KV format), and with quotas for each tenant besides, since requests of one
group fail for want of the same memory. A walk looks at the groups' heads only, so it costs nothing for the thousands
behind a head that cannot be had.

A request whose first token cannot be in time any more is *late*: it goes behind all that still can, where late ones
are in the order of arrival. Whatever the policy and however late, there is a last resort: a request that has waited
for `overtaking_limit_s` is *aged*, and first of all.
"""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from fineserve_jax.request import Request
from fineserve_jax.scheduler.policies import SortKey

Group: TypeAlias = tuple[str, ...]
AGED, ON_TIME, LATE = -1, 0, 1


class Entry(NamedTuple):
    """A waiting request as it compares with others: `rank` is AGED, ON_TIME or LATE, `sequence` is distinct."""

    rank: int
    key: SortKey
    sequence: int
    request: Request


@dataclass(slots=True)
class _Heaps:
    """Entries of one group; those that are no longer so are dropped when they come to the top.

    Attributes:
        by_key: on-time requests in the policy's order.
        by_arrival: the same by sequence.
        late: late requests by sequence.
    """

    by_key: list[Entry] = field(default_factory=list)
    by_arrival: list[tuple[int, Request]] = field(default_factory=list)
    late: list[tuple[int, Request]] = field(default_factory=list)
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
        self._waiting: dict[Request, int] = {}  # rank, ON_TIME or LATE
        self._heaps: dict[Group, _Heaps] = {}
        self._by_latest_start: list[tuple[float, int, Request]] = []

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def groups(self) -> list[Group]:
        """Groups in which a request waits, in the order in which they were first seen."""
        return [group for group, heaps in self._heaps.items() if heaps.num_waiting]

    def push(self, request: Request) -> None:
        heaps = self._heaps.setdefault(self.group_of(request), _Heaps())
        sequence = request.sequence
        heapq.heappush(heaps.by_key, Entry(ON_TIME, self._key_of(request), sequence, request))
        heapq.heappush(heaps.by_arrival, (sequence, request))
        self._waiting[request] = ON_TIME
        heaps.num_waiting += 1
        latest_start = self._latest_start_of(request)
        if latest_start < math.inf:
            heapq.heappush(self._by_latest_start, (latest_start, sequence, request))
        self._compact(heaps)

    def remove(self, request: Request) -> None:
        del self._waiting[request]
        group = self.group_of(request)
        self._heaps[group].num_waiting -= 1
        if not self._heaps[group].num_waiting:
            del self._heaps[group]

    def defer_late(self, now: float) -> list[Request]:
        """Put requests that cannot start in time any more behind the others; those that became late now."""
        became_late, starts = [], self._by_latest_start
        while starts and starts[0][0] < now:
            _, sequence, request = heapq.heappop(starts)
            # Asked again: it may have been admitted since, got its first token, and lost its memory.
            if self._waiting.get(request) == ON_TIME and self._latest_start_of(request) < now:
                self._waiting[request] = LATE
                heapq.heappush(self._heaps[self.group_of(request)].late, (sequence, request))
                became_late.append(request)
        return became_late

    def head(self, group: Group, now: float = -math.inf) -> Entry | None:
        """The group's first request."""
        late, oldest = self.oldest(group, LATE), self.oldest(group)
        first = min((r for r in (late, oldest) if r is not None), key=lambda r: r.sequence, default=None)
        if first is not None and now - first.times.arrival_s >= self._overtaking_limit_s:
            return Entry(AGED, first.times.arrival_s, first.sequence, first)
        by_key = self._heaps[group].by_key if group in self._heaps else []
        while by_key and self._waiting.get(by_key[0].request) != ON_TIME:
            heapq.heappop(by_key)
        if by_key:
            return by_key[0]
        return None if late is None else Entry(LATE, late.times.arrival_s, late.sequence, late)

    def oldest(self, group: Group, rank: int = ON_TIME) -> Request | None:
        """The group's request of that rank, ON_TIME or LATE, that arrived first."""
        heaps = self._heaps.get(group)
        if heaps is None:
            return None
        heap = heaps.by_arrival if rank == ON_TIME else heaps.late
        while heap and self._waiting.get(heap[0][1]) != rank:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def is_overdue(self, group: Group, now: float, ageing_s: float) -> bool:
        """Whether a request of the group has waited as long as any should have to."""
        head, oldest = self.head(group, now), self.oldest(group)
        if head is not None and head.rank == AGED:
            return True
        return oldest is not None and now - oldest.times.arrival_s >= ageing_s

    def _compact(self, heaps: _Heaps) -> None:
        """Rebuild heaps that are mostly stale, at a cost that the removals before have paid for."""
        limit = 2 * heaps.num_waiting + 64
        if len(heaps.by_key) > limit:
            # By sequence: a request that was preempted and pushed again may be in it twice.
            live = {entry.sequence: entry for entry in heaps.by_key if self._waiting.get(entry.request) == ON_TIME}
            heaps.by_key = list(live.values())
            heapq.heapify(heaps.by_key)
        if len(heaps.by_arrival) > limit:
            heaps.by_arrival = self._live(heaps.by_arrival, ON_TIME)
        if len(heaps.late) > limit:
            heaps.late = self._live(heaps.late, LATE)
        if len(self._by_latest_start) > 2 * len(self._waiting) + 64:
            starts = {entry[1]: entry for entry in self._by_latest_start if self._waiting.get(entry[2]) == ON_TIME}
            self._by_latest_start = list(starts.values())
            heapq.heapify(self._by_latest_start)

    def _live(self, heap: list[tuple[int, Request]], rank: int) -> list[tuple[int, Request]]:
        live = list({entry[0]: entry for entry in heap if self._waiting.get(entry[1]) == rank}.values())
        heapq.heapify(live)
        return live


def model_and_format(request: Request) -> Group:
    return (request.model, request.kv_precision)


def model_format_and_tenant(request: Request) -> Group:
    return (request.model, request.kv_precision, request.tenant)
