"""What one request holds: for each layer group runs of pages, each in one format, in the order of positions.

    positions        0 .. 2T-1    2T .. 4T-1    4T .. 5T-1   5T .. 5T+k-1
    int8             run of 6 pages, the last filled up to k
    int4             run of 5 pages                          residual (int8), filled up to k
    bf16, narrowed   run (int4)   run (int8)    run of 2 pages (bf16)
    a window of T+k  dropped                    run of 2 pages

A format that encodes whole pages keeps its newest, unfilled page in a wider format, its *residual page*. When that
is full it is encoded into a page of its own and begins anew. Pages are numbered from the first position on, whether
they are still there or not.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from fineserve_jax.kv.classes import PageClass


def _no_handles() -> "array[int]":
    return array("i")


@dataclass(slots=True)
class PageRun:
    """Adjacent pages of one class, by handle (see `kv/page_table.py`)."""

    page_class: PageClass
    handles: "array[int]" = field(default_factory=_no_handles)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a request's cached tokens in one format: `num_tokens` from `first_position` on, in `pages`.

    precision: the KV precision that they are part of; "": it is called as the format.
    """

    kv_format: str
    pages: list[int]
    first_position: int
    num_tokens: int
    precision: str = ""


@dataclass(slots=True)
class GroupPages:
    """The pages of one layer group that a request holds.

    Attributes:
        page_class: class of its newest pages, and of all until some are narrowed.
        runs: its pages, in the order of positions.
        residual: handle of the residual page; None for a format without one, and before the first page.
        num_dropped: leading pages that are gone, because nothing that is still to be computed attends to their tokens.
    """

    page_class: PageClass
    runs: list[PageRun] = field(default_factory=list)
    residual: int | None = None
    num_dropped: int = 0

    @property
    def num_pages(self) -> int:
        """Number behind the last page, the residual page aside."""
        return self.num_dropped + sum(len(run.handles) for run in self.runs)

    def append(self, page_class: PageClass, handles: "array[int]") -> None:
        """Add pages behind the last."""
        if not handles:
            return
        if not self.runs or self.runs[-1].page_class is not page_class:
            self.runs.append(PageRun(page_class))
        self.runs[-1].handles.extend(handles)

    def page(self, index: int) -> tuple[PageClass, int]:
        """Class and handle of a page."""
        place = index - self.num_dropped
        for run in self.runs if place >= 0 else ():
            if place < len(run.handles):
                return run.page_class, run.handles[place]
            place -= len(run.handles)
        raise IndexError(f"page {index} was dropped, or is beyond the last")

    def parts(self, first: int, stop: int) -> Iterator[PageRun]:
        """The pages from `first` to `stop` that are there, run by run."""
        first, stop = first - self.num_dropped, stop - self.num_dropped
        for run in self.runs:
            part = run.handles[max(0, first) : max(0, stop)]
            if part:
                yield PageRun(run.page_class, part)
            first, stop = first - len(run.handles), stop - len(run.handles)

    def handles(self, first: int, stop: int) -> "array[int]":
        """Handles of the pages from `first` to `stop` that are there."""
        return array("i", (handle for run in self.parts(first, stop) for handle in run.handles))

    def replace(self, first: int, page_class: PageClass, handles: "array[int]") -> "array[int]":
        """Put other pages in the place of as many from `first` on; the handles that these had."""
        stop, total = first + len(handles), self.num_pages
        before, old, after = (list(self.parts(*ends)) for ends in ((0, first), (first, stop), (stop, total)))
        self.runs = []
        for run in (*before, PageRun(page_class, handles), *after):
            self.append(run.page_class, run.handles)
        return array("i", (handle for run in old for handle in run.handles))

    def drop(self, stop: int) -> "array[int]":
        """Give up the pages ahead of `stop`; their handles."""
        dropped, kept = self.handles(0, stop), list(self.parts(stop, self.num_pages))
        if dropped:
            self.runs, self.num_dropped = kept, self.num_dropped + len(dropped)
        return dropped

    def segments(self, num_cached: int, units_of: Callable[[Sequence[int]], list[int]]) -> list[Segment]:
        """Where those of the first `num_cached` tokens are that have pages, in the order of positions; no empty
        segments.

        Args:
            units_of: first units of pages, given their handles.
        """
        size, segments = self.page_class.page_size, []
        first = self.num_dropped * size
        for run in self.parts(0, self.page_class.num_pages(num_cached)):
            count = min(num_cached - first, len(run.handles) * size)
            own = run.page_class
            segments.append(Segment(own.kv_format, units_of(run.handles), first, count, own.recipe or ""))
            first += count
        if self.residual is not None and self.page_class.residual is not None and num_cached > first:
            residual = units_of([self.residual])
            kv_format, recipe = self.page_class.residual.kv_format, self.page_class.recipe or ""
            segments.append(Segment(kv_format, residual, first, num_cached - first, recipe))
        return segments


@dataclass(slots=True)
class RequestPages:
    """What one request holds.

    Attributes:
        groups: the pages of each layer group.
        num_cached_blocks: leading blocks that are cached, or were when another one had the same tokens.
        num_ready: leading blocks of those that are known to hold their keys and values.
        block_hash: of the last cached block; the request's `prefix_root` for none.
        waits: whether some of its leading blocks are yet to be computed by another request.
        exact: whether its keys and values are what computing it alone in its format would have given: not after
            pages that later tokens see were converted from another format. Unless `prefix_cache` is "convert", only
            exact pages are shared.
    """

    groups: list[GroupPages]
    num_cached_blocks: int = 0
    num_ready: int = 0
    block_hash: bytes = b""
    waits: bool = False
    exact: bool = True

    @property
    def page_class(self) -> PageClass:
        """The request's: class of the first group's newest pages."""
        return self.groups[0].page_class

    @property
    def num_pages(self) -> int:
        """Number behind the last page that all groups have."""
        return min(group.num_pages for group in self.groups)


def no_pages(page_class: PageClass) -> RequestPages:
    """What a request in this class holds before it has any page."""
    return RequestPages([GroupPages(group) for group in page_class.groups])
