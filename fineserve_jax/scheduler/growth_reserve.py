"""Pages that admission leaves free, so that each running request can still grow."""

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.scheduler.running_request import RunningRequest


class GrowthReserve:
    """Pages that admission leaves free, so that each running request can still grow; kept up to date as requests come,
    grow and go.

    Args:
        pages_each: most pages to reserve for a request.
    """

    def __init__(self, pages_each: int) -> None:
        self._pages_each = pages_each
        self._shares: dict[PageClass, frozenset[str]] = {}
        self._num_running: dict[PageClass, int] = {}
        self._pages: dict[PageClass, int] = {}

    def add(self, running: RunningRequest) -> None:
        self._shares[running.page_class] = running.shares
        self._num_running[running.page_class] = self._num_running.get(running.page_class, 0) + 1
        self._count(running, self.wanted(running))

    def update(self, running: RunningRequest) -> None:
        """The request has grown."""
        self._count(running, self.wanted(running))

    def remove(self, running: RunningRequest) -> None:
        self._num_running[running.page_class] -= 1
        self._count(running, 0)

    def wanted(self, running: RunningRequest) -> int:
        return min(self._pages_each, running.pages_to_come)

    def beside(self, joining: RunningRequest) -> dict[PageClass, int] | None:
        """Pages to leave free if `joining` joins, its own included, by class; None if no other competes with it."""
        reserve = {
            page_class: self._pages[page_class]
            for page_class, num_running in self._num_running.items()
            if num_running and not joining.shares.isdisjoint(self._shares[page_class])
        }
        if not reserve:
            return None
        reserve[joining.page_class] = reserve.get(joining.page_class, 0) + self.wanted(joining)
        return reserve

    def _count(self, running: RunningRequest, pages: int) -> None:
        self._pages[running.page_class] = self._pages.get(running.page_class, 0) + pages - running.reserved_pages
        running.reserved_pages = pages
