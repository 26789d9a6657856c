"""The waiting queue: one heap for each (model, KV format), and with quotas for each tenant besides, since requests of
one group fail for want of the same memory. A walk looks at the groups' heads only, so it costs nothing for the
thousands behind a head that cannot be had.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

from fineserve_jax.request import Request
from fineserve_jax.scheduler.policies import SortKey

Group: TypeAlias = tuple[str | None, ...]
Entry: TypeAlias = tuple[SortKey, int, Request]
"""Sort key, `Request.sequence` (distinct, so that requests are never compared), request."""


@dataclass(slots=True)
class _Heaps:
    """Entries of one group; those of requests that wait no more are dropped when they come to the top."""

    by_key: list[Entry] = field(default_factory=list)
    by_arrival: list[tuple[int, Request]] = field(default_factory=list)
    num_waiting: int = 0


class WaitingQueue:
    """Requests in the order of a policy.

    Args:
        key_of: a request's sort key; asked once, when the request is pushed.
        group_of: a request's group.
    """

    def __init__(
        self, key_of: Callable[[Request], SortKey], group_of: Callable[[Request], Group] | None = None
    ) -> None:
        self._key_of = key_of
        self.group_of = group_of or model_and_format
        self._waiting: set[Request] = set()
        self._heaps: dict[Group, _Heaps] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request: Request) -> bool:
        return request in self._waiting

    def groups(self) -> list[Group]:
        """Groups in which a request waits, in the order in which they were first seen."""
        return [group for group, heaps in self._heaps.items() if heaps.num_waiting]

    def push(self, request: Request) -> None:
        heaps = self._heaps.setdefault(self.group_of(request), _Heaps())
        heapq.heappush(heaps.by_key, (self._key_of(request), request.sequence, request))
        heapq.heappush(heaps.by_arrival, (request.sequence, request))
        self._waiting.add(request)
        heaps.num_waiting += 1
        self._compact(heaps)

    def remove(self, request: Request) -> None:
        self._waiting.remove(request)
        self._heaps[self.group_of(request)].num_waiting -= 1

    def head(self, group: Group) -> Entry | None:
        """The group's first request in the policy's order."""
        by_key = self._heaps[group].by_key
        while by_key and by_key[0][2] not in self._waiting:
            heapq.heappop(by_key)
        return by_key[0] if by_key else None

    def oldest(self, group: Group) -> Request | None:
        """The group's request that arrived first."""
        by_arrival = self._heaps[group].by_arrival
        while by_arrival and by_arrival[0][1] not in self._waiting:
            heapq.heappop(by_arrival)
        return by_arrival[0][1] if by_arrival else None

    def _compact(self, heaps: _Heaps) -> None:
        """Rebuild heaps that are mostly stale, at a cost that the removals before have paid for."""
        limit = 2 * heaps.num_waiting + 64
        if len(heaps.by_key) > limit:
            # By sequence: a request that was preempted and pushed again may be in it twice.
            live_keys = {entry[1]: entry for entry in heaps.by_key if entry[2] in self._waiting}
            heaps.by_key = list(live_keys.values())
            heapq.heapify(heaps.by_key)
        if len(heaps.by_arrival) > limit:
            live_arrivals = {entry[0]: entry for entry in heaps.by_arrival if entry[1] in self._waiting}
            heaps.by_arrival = list(live_arrivals.values())
            heapq.heapify(heaps.by_arrival)


def model_and_format(request: Request) -> Group:
    return (request.model, request.kv_precision)


def model_format_and_tenant(request: Request) -> Group:
    return (request.model, request.kv_precision, request.tenant)
