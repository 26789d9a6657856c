"""Pages of preempted requests in host memory, to be copied back instead of computed again."""

from array import array
from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.operations import HostPages, Load, Save
from fineserve_jax.kv.page_pool import Demand, PagePool
from fineserve_jax.kv.request_pages import RequestPages
from fineserve_jax.request import Request


@dataclass(frozen=True, slots=True)
class Saved:
    """What a request held: `runs` (class, pages) in the order of positions, and then its residual page if any."""

    pages: HostPages
    page_class: PageClass
    runs: list[tuple[PageClass, int]]
    has_residual: bool
    exact: bool


class HostMemory:
    """Saves and restores what requests hold.

    Args:
        pool: where pages are.
        max_bytes: most bytes to keep.
        num_saved: requests that were saved before.

    Attributes:
        saved: by request.
        used_bytes: bytes of all of them.
        num_saved: requests saved since the start.
    """

    def __init__(self, pool: PagePool, max_bytes: int, num_saved: int = 0) -> None:
        self._pool = pool
        self.max_bytes = max_bytes
        self.saved: dict[Request, Saved] = {}
        self.used_bytes = 0
        self.num_saved = num_saved

    def num_bytes(self, request: Request, held: RequestPages) -> int:
        """Bytes that saving the request would take: the pages of its computed tokens, and its residual page."""
        return self._bytes([*_computed_runs(request, held), *_residual(held)])

    def has_room(self, request: Request, held: RequestPages) -> bool:
        """Whether the request may be saved without exceeding `max_bytes`."""
        return self.used_bytes + self.num_bytes(request, held) <= self.max_bytes

    def save(self, request: Request, held: RequestPages) -> None:
        """Queue the copy of a request's pages to host memory, which must have room. They may be released then."""
        runs = _computed_runs(request, held)
        handles = [list(run.handles) for run in held.parts(0, sum(count for _, count in runs))]
        pages = [*runs, *_residual(held)]
        if held.residual is not None:
            handles.append([held.residual])
        host = HostPages([page_class for page_class, _ in pages], [count for _, count in pages])
        self._pool.enqueue(Save(host, [self._pool.table.units_of(part) for part in handles]))
        self.saved[request] = Saved(host, held.page_class, runs, held.residual is not None, held.exact)
        self.used_bytes += self._bytes(pages)
        self.num_saved += 1

    def load(self, request: Request, num_tokens: int, leaving: Demand | None) -> RequestPages | None:
        """Pages for the first `num_tokens` tokens of a saved request, with the copy of what was saved queued; None if
        they cannot be had."""
        saved = self.saved[request]
        demand: dict[PageClass, int] = {}
        for page_class, count in _wanted(saved, num_tokens):
            demand[page_class] = demand.get(page_class, 0) + count
        pages = self._pool.take(demand, leaving)
        if pages is None:
            return None
        held = RequestPages(saved.page_class, block_hash=request.prefix_root, exact=saved.exact)
        if saved.has_residual and saved.page_class.residual is not None:
            held.residual = pages[saved.page_class.residual].pop()
        units = []
        for page_class, count in saved.runs:
            own = pages[page_class]
            units.append(self._pool.table.units_of(own[:count]))
            held.append(page_class, own[:count])
            del own[:count]
        held.append(saved.page_class, pages.get(saved.page_class, array("i")))
        if held.residual is not None:
            units.append(self._pool.table.units_of([held.residual]))
        self._pool.enqueue(Load(saved.pages, units))
        held.num_ready = request.num_computed_tokens // saved.page_class.page_size
        self.forget(request)
        return held

    def forget(self, request: Request) -> None:
        """Give up what is saved of a request, if anything is."""
        saved = self.saved.pop(request, None)
        if saved is not None:
            self.used_bytes -= saved.pages.num_units * self._pool.allocator.unit_bytes

    def _bytes(self, runs: list[tuple[PageClass, int]]) -> int:
        return sum(page_class.page_units * count for page_class, count in runs) * self._pool.allocator.unit_bytes


def _computed_runs(request: Request, held: RequestPages) -> list[tuple[PageClass, int]]:
    """Class and number of the pages that hold computed tokens, run by run."""
    computed = held.page_class.num_pages(request.num_computed_tokens)
    return [(run.page_class, len(run.handles)) for run in held.parts(0, computed)]


def _residual(held: RequestPages) -> list[tuple[PageClass, int]]:
    """Class and number, 1, of the residual page; empty if there is none."""
    if held.residual is None or held.page_class.residual is None:
        return []
    return [(held.page_class.residual, 1)]


def _wanted(saved: Saved, num_tokens: int) -> list[tuple[PageClass, int]]:
    """Pages by class that a saved request needs: those it had, and more for tokens not computed yet."""
    more = saved.page_class.num_pages(num_tokens) - sum(count for _, count in saved.runs)
    wanted = [*saved.runs]
    if more > 0:
        wanted.append((saved.page_class, more))
    if saved.has_residual and saved.page_class.residual is not None:
        wanted.append((saved.page_class.residual, 1))
    return wanted
