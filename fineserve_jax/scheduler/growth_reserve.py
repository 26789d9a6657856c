"""Pages that admission leaves free, so that each running request can still grow."""

from collections import Counter

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.scheduler.running_request import RunningRequest


class GrowthReserve:
    """Pages that admission leaves free, so that each running request can still grow; kept up to date as requests come,
    grow and go.

    Args:
        pages_each: most pages of each layer group to reserve for a request.
    """

    def __init__(self, pages_each: int) -> None:
        self._pages_each = pages_each
        self._shares: dict[PageClass, frozenset[str]] = {}
        self._num_running: Counter[PageClass] = Counter()
        self._pages: Counter[PageClass] = Counter()

    def add(self, running: RunningRequest) -> None:
        for page_class in running.groups:
            self._shares[page_class] = running.shares
            self._num_running[page_class] += 1
        self._count(running, running.pages_to_come(self._pages_each))

    def update(self, running: RunningRequest) -> None:
        """The request has grown."""
        self._count(running, running.pages_to_come(self._pages_each))

    def remove(self, running: RunningRequest) -> None:
        for page_class in running.groups:
            self._num_running[page_class] -= 1
        self._count(running, {})

    def beside(self, joining: RunningRequest) -> dict[PageClass, int] | None:
        """Pages to leave free if `joining` joins, its own included, by class; None if no other competes with it."""
        reserve = {
            page_class: self._pages[page_class]
            for page_class, num_running in self._num_running.items()
            if num_running and not joining.shares.isdisjoint(self._shares[page_class])
        }
        if not reserve:
            return None
        for page_class, count in joining.pages_to_come(self._pages_each).items():
            reserve[page_class] = reserve.get(page_class, 0) + count
        return reserve

    def _count(self, running: RunningRequest, pages: dict[PageClass, int]) -> None:
        if pages != running.reserved_pages:
            self._pages.subtract(running.reserved_pages)
            self._pages.update(pages)
            running.reserved_pages = pages
