"""A row: a request that holds memory, what the scheduler notes about it, and what all rows may still want."""

from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request import Request
from fineserve_jax.scheduler.policies import SortKey


@dataclass(eq=False, slots=True)
class Row:
    """An admitted request.

    Attributes:
        request: READY or RUNNING.
        page_class: class of its pages.
        shares: names of the memory shares that its pages come from; rows with none in common do not compete.
        walk: number of the admission walk that admitted it.
        key: its rank and key in the waiting queue then.
        covered_tokens: tokens that the pages it holds have room for; noted, so that only every `page_size`-th
            decode step of a row has to ask for memory.
        reserved_pages: pages counted for it in `GrowthReserve`.
    """

    request: Request
    page_class: PageClass
    shares: frozenset[str]
    walk: int
    key: SortKey
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

    def competes_with(self, other: "Row") -> bool:
        return not self.shares.isdisjoint(other.shares)


class GrowthReserve:
    """Pages that admission leaves free, so that each row can still grow; kept up to date as rows come, grow
    and go.

    Args:
        pages_per_row: most pages to reserve for a row.
    """

    def __init__(self, pages_per_row: int) -> None:
        self._pages_per_row = pages_per_row
        self._shares: dict[PageClass, frozenset[str]] = {}
        self._num_rows: dict[PageClass, int] = {}
        self._pages: dict[PageClass, int] = {}

    def add(self, row: Row) -> None:
        self._shares[row.page_class] = row.shares
        self._num_rows[row.page_class] = self._num_rows.get(row.page_class, 0) + 1
        self._count(row, self.wanted(row))

    def update(self, row: Row) -> None:
        """The row has grown."""
        self._count(row, self.wanted(row))

    def remove(self, row: Row) -> None:
        self._num_rows[row.page_class] -= 1
        self._count(row, 0)

    def wanted(self, row: Row) -> int:
        return min(self._pages_per_row, row.pages_to_come)

    def beside(self, row: Row) -> dict[PageClass, int] | None:
        """Pages to leave free if `row` joins, its own included, by class; None if no other competes with
        it."""
        reserve = {
            page_class: self._pages[page_class]
            for page_class, num_rows in self._num_rows.items()
            if num_rows and not row.shares.isdisjoint(self._shares[page_class])
        }
        if not reserve:
            return None
        reserve[row.page_class] = reserve.get(row.page_class, 0) + self.wanted(row)
        return reserve

    def _count(self, row: Row, pages: int) -> None:
        self._pages[row.page_class] = self._pages.get(row.page_class, 0) + pages - row.reserved_pages
        row.reserved_pages = pages


def shares_of(kv: KVManager, page_class: PageClass) -> frozenset[str]:
    """Memory shares that a request's pages, its residual page's included, count against."""
    return kv.share_names(page_class)
