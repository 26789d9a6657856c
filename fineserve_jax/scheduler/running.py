"""The running set: the requests that hold memory, in the order of admission.

admission     adds requests
growth        asks for pages for those that have outgrown theirs
victims       chooses who gives way
preempt       takes a request's pages, saves them or not, and puts it back into the waiting queue
"""

from collections import Counter
from collections.abc import Iterable, Iterator

from fineserve_jax.request.request import Request
from fineserve_jax.scheduler.growth_reserve import GrowthReserve
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.running_request import RunningRequest
from fineserve_jax.scheduler.swapping import Swapping
from fineserve_jax.scheduler.waiting import AGED, WaitingQueue


class RunningRequests:
    """The running requests, in the order of admission. Iterating gives them oldest admission first.

    Args:
        growth_reserve_pages: most pages to reserve for the growth of each.
        queue: where preempted requests wait.
        swapping: takes the pages of preempted requests, and saves what they hold where that pays.
        quotas: told of what preempted requests no longer hold.

    Attributes:
        reserve: pages that they may still want. Admission adds a request to it as soon as the request has its pages,
            and to the running ones at the end of the pass.
        num_preemptions: how often one was preempted since the start.
    """

    def __init__(self, growth_reserve_pages: int, queue: WaitingQueue, swapping: Swapping, quotas: Quotas) -> None:
        self.reserve = GrowthReserve(growth_reserve_pages)
        self.num_preemptions = 0
        self._queue, self._swapping, self._quotas = queue, swapping, quotas
        self._by_request: dict[Request, RunningRequest] = {}
        self._num_of_priority: Counter[int] = Counter()

    def __len__(self) -> int:
        return len(self._by_request)

    def __iter__(self) -> Iterator[RunningRequest]:
        return iter(self._by_request.values())

    def __reversed__(self) -> Iterator[RunningRequest]:
        """Latest admission first."""
        return reversed(self._by_request.values())

    def get(self, request: Request) -> RunningRequest | None:
        """The running request of that request; None if it does not run."""
        return self._by_request.get(request)

    def __contains__(self, running: RunningRequest) -> bool:
        return running.request in self._by_request

    def add(self, running: RunningRequest) -> None:
        """Add a request as the latest admitted; `reserve` counts it already."""
        self._by_request[running.request] = running
        self._num_of_priority[running.request.options.priority] += 1

    def remove(self, running: RunningRequest) -> None:
        """Remove a request that ends or is preempted."""
        del self._by_request[running.request]
        self._num_of_priority[running.request.options.priority] -= 1
        if not self._num_of_priority[running.request.options.priority]:
            del self._num_of_priority[running.request.options.priority]
        self.reserve.remove(running)

    def preempt(self, running: RunningRequest) -> None:
        """Take a request's pages and let it wait again; its tokens stay."""
        request = running.request
        self.remove(running)
        self._swapping.take_pages(request)
        self._quotas.note(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._queue.push(request)

    def restart(self, running: RunningRequest) -> None:
        """Take a request's pages, to be computed again whatever host memory has room for; its tokens stay."""
        request = running.request
        self.remove(running)
        self._swapping.drop_pages(request)
        self._quotas.note(request)
        self._queue.push(request)

    def least_urgent_first(self) -> Iterable[RunningRequest]:
        """Those of the largest priority number first, and of one priority the latest admitted first."""
        if len(self._num_of_priority) <= 1:
            return reversed(self)
        latest_first = list(reversed(self))
        latest_first.sort(key=self.priority_of, reverse=True)
        return latest_first

    def priority_of(self, running: RunningRequest) -> int:
        """The priority number by which a request gives way: its own, but one that had waited for `overtaking_limit_s`
        is as urgent as the most urgent that runs."""
        return min(self._num_of_priority) if running.entry.rank == AGED else running.request.options.priority
