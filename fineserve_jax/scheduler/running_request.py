"""A request that holds memory, and what the scheduler notes about it."""

from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.request import Request
from fineserve_jax.scheduler.waiting import Entry


@dataclass(eq=False, slots=True)
class RunningRequest:
    """An admitted request.

    Attributes:
        request: READY or RUNNING.
        page_class: class of its pages.
        shares: names of the memory shares that its pages come from; requests with none in common do not compete.
        admission_pass: number of the admission pass that admitted it.
        entry: its entry in the waiting queue then.
        covered_tokens: tokens that the pages it holds have room for; noted, so that only every `page_size`-th
            decode step of a request has to ask for memory.
        reserved_pages: pages counted for it in `GrowthReserve`.
    """

    request: Request
    page_class: PageClass
    shares: frozenset[str]
    admission_pass: int
    entry: Entry
    covered_tokens: int = 0
    reserved_pages: int = 0

    def note_growth(self) -> None:
        """Its pages now hold all its known tokens."""
        self.covered_tokens = self.page_class.room(self.request.num_tokens)

    @property
    def pages_to_come(self) -> int:
        """Pages it lacks at its greatest length; the last token's K and V are never kept."""
        num_pages, request = self.page_class.num_pages, self.request
        return max(0, num_pages(request.max_total_tokens - 1) - num_pages(request.num_tokens))

    def competes_with(self, other: "RunningRequest") -> bool:
        return not self.shares.isdisjoint(other.shares)
