"""A request that holds memory, and what the scheduler notes about it."""

from dataclasses import dataclass, field

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.request.request import Request
from fineserve_jax.scheduler.drafting import Drafting
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
        reserved_pages: pages counted for it in `GrowthReserve`, by class.
        drafting: what is known of its drafts; None: it has had none yet.
    """

    request: Request
    page_class: PageClass
    shares: frozenset[str]
    admission_pass: int
    entry: Entry
    covered_tokens: int = 0
    reserved_pages: dict[PageClass, int] = field(default_factory=dict)
    drafting: Drafting | None = None

    def note_growth(self) -> None:
        """It has got pages for all its known tokens, or in layers with a window for the next step."""
        self.covered_tokens = self.page_class.room(self.request.num_tokens, self.request.num_computed_tokens)

    def pages_to_come(self, most: int) -> dict[PageClass, int]:
        """Pages of each layer group that it may lack until its greatest length, up to `most` of each; the last token's
        K and V are never kept."""
        known, computed = self.request.num_tokens, self.request.num_computed_tokens
        longest = self.request.max_total_tokens - 1
        lacking = {c: c.most_pages(longest) - c.end_page(known, computed) + c.first_page(computed) for c in self.groups}
        return {page_class: min(most, count) for page_class, count in lacking.items() if count > 0}

    @property
    def groups(self) -> tuple[PageClass, ...]:
        """Classes of its pages, one for each layer group."""
        return self.page_class.groups

    def competes_with(self, other: "RunningRequest") -> bool:
        return not self.shares.isdisjoint(other.shares)
