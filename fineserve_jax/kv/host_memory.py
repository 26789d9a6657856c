"""Pages of preempted requests in host memory, to be copied back instead of computed again."""

from array import array
from collections import Counter
from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.operations import HostPages, Load, Save
from fineserve_jax.kv.page_pool import Demand, PagePool
from fineserve_jax.kv.request_pages import GroupPages, RequestPages
from fineserve_jax.request.request import Request

Runs = list[tuple[PageClass, int]]  # class, pages


@dataclass(frozen=True, slots=True)
class SavedGroup:
    """What a request held for a layer group: its runs of pages in the order of positions, behind the dropped ones, and
    then its residual page if any."""

    page_class: PageClass
    num_dropped: int
    runs: Runs
    residual: Runs

    @property
    def num_pages(self) -> int:
        """Number behind the last page."""
        return self.num_dropped + sum(count for _, count in self.runs)


@dataclass(frozen=True, slots=True)
class Saved:
    """What a request held, group by group."""

    pages: HostPages
    groups: list[SavedGroup]
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
        return self._bytes(_all_runs(_computed(request, held)))

    def has_room(self, request: Request, held: RequestPages) -> bool:
        """Whether the request may be saved without exceeding `max_bytes`."""
        return self.used_bytes + self.num_bytes(request, held) <= self.max_bytes

    def save(self, request: Request, held: RequestPages) -> None:
        """Queue the copy of a request's pages to host memory, which must have room. They may be released then."""
        groups, handles = _computed(request, held), []
        for group, saved in zip(held.groups, groups, strict=True):
            handles += [list(run.handles) for run in group.parts(0, saved.num_pages)]
            handles += [] if group.residual is None else [[group.residual]]
        pages = _all_runs(groups)
        host = HostPages([page_class for page_class, _ in pages], [count for _, count in pages])
        self._pool.enqueue(Save(host, [self._pool.table.units_of(part) for part in handles]))
        self.saved[request] = Saved(host, groups, held.exact)
        self.used_bytes += self._bytes(pages)
        self.num_saved += 1

    def load(self, request: Request, num_tokens: int, leaving: Demand | None) -> RequestPages | None:
        """Pages for the first `num_tokens` tokens of a saved request, with the copy of what was saved queued; None if
        they cannot be had."""
        saved, computed = self.saved[request], request.num_computed_tokens
        demand: Counter[PageClass] = Counter()
        for group in saved.groups:
            more = group.page_class.end_page(num_tokens, computed) - group.num_pages
            for page_class, count in [*group.runs, *group.residual, (group.page_class, max(0, more))]:
                demand[page_class] += count
        pages = self._pool.take(+demand, leaving)
        if pages is None:
            return None
        units: list[list[int]] = []
        groups = [self._load_group(group, pages, units) for group in saved.groups]
        held = RequestPages(
            groups,
            num_ready=computed // groups[0].page_class.page_size,
            block_hash=request.prefix_root,
            exact=saved.exact,
        )
        self._pool.enqueue(Load(saved.pages, units))
        self.forget(request)
        return held

    def _load_group(
        self, saved: SavedGroup, pages: "dict[PageClass, array[int]]", units: list[list[int]]
    ) -> GroupPages:
        """A group's pages, out of new ones of its classes; `units` is told where its saved ones go to."""
        group = GroupPages(saved.page_class, num_dropped=saved.num_dropped)
        for page_class, _ in saved.residual:
            group.residual = pages[page_class].pop()
        for page_class, count in saved.runs:
            own = pages[page_class]
            units.append(self._pool.table.units_of(own[:count]))
            group.append(page_class, own[:count])
            del own[:count]
        group.append(saved.page_class, pages.get(saved.page_class, array("i")))
        if group.residual is not None:
            units.append(self._pool.table.units_of([group.residual]))
        return group

    def forget(self, request: Request) -> None:
        """Give up what is saved of a request, if anything is."""
        saved = self.saved.pop(request, None)
        if saved is not None:
            self.used_bytes -= saved.pages.num_units * self._pool.allocator.unit_bytes

    def _bytes(self, runs: Runs) -> int:
        return sum(page_class.page_units * count for page_class, count in runs) * self._pool.allocator.unit_bytes


def _computed(request: Request, held: RequestPages) -> list[SavedGroup]:
    """What holds the request's computed tokens: pages that are full or begun, and residual pages."""
    return [_computed_of(request, group) for group in held.groups]


def _computed_of(request: Request, group: GroupPages) -> SavedGroup:
    own = group.page_class
    runs = [(run.page_class, len(run.handles)) for run in group.parts(0, own.num_pages(request.num_computed_tokens))]
    residual = [] if group.residual is None or own.residual is None else [(own.residual, 1)]
    return SavedGroup(own, group.num_dropped, runs, residual)


def _all_runs(groups: list[SavedGroup]) -> Runs:
    """The runs of all groups, each group's residual page behind its others."""
    return [run for group in groups for run in (*group.runs, *group.residual)]
