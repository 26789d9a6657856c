"""Prefixes that rows of a batch have in common, read once: the rows' queries attend to them side by side.

    row 0   | a b c d | e f .         group 0  | a b c d |   rows 0, 1 and 3
    row 1   | a b c d | g .           row 0    | e f .
    row 2   | h i .           --->    row 1    | g .
    row 3   | a b c d | j k l         row 2    | h i .
                                      row 3    | j k l

What a row saw of its group's pages and of its own merges as parts of one attention. Only whole pages are shared, which
every row of a group sees to the end.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

from fineserve_jax.pallas_kernels.tiles import BatchSegment, QueryRun


@dataclass(slots=True)
class SharedPrefixes:
    """The cached tokens of a batch in which each row has one query.

    Attributes:
        segments: what rows have in common; their `row` is the number of the group.
        queries: of each group, on a query axis where rows lie in the order of `rows`.
        rows: the rows of all groups, group by group.
        rest: what is left for each row by itself.
        num_saved: tokens that are read less often, each counted as often as that.
    """

    segments: list[BatchSegment] = field(default_factory=list)
    queries: list[QueryRun] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    rest: list[BatchSegment] = field(default_factory=list)
    num_saved: int = 0

    def add(self, group: Sequence[BatchSegment], num_pages: int, page_size: int) -> None:
        """Takes the first pages of these segments as those of a group."""
        shared = num_pages * page_size
        first = group[0]
        self.segments.append(replace(first, row=len(self.queries), pages=first.pages[:num_pages], num_tokens=shared))
        # From behind the prefix on, a query sees all of it.
        self.queries.append(QueryRun(len(self.rows), len(group), shared))
        self.rows += [segment.row for segment in group]
        self.num_saved += (len(group) - 1) * shared
        for segment in group:
            if segment.num_tokens > shared:
                left = segment.num_tokens - shared
                self.rest.append(BatchSegment(segment.row, segment.format_id, segment.pages[num_pages:], left, shared))


def find_shared_prefixes(segments: Sequence[BatchSegment], page_size: int, min_saved: int) -> SharedPrefixes:
    """Groups the rows of a batch by the pages that they begin with.

    Of the rows that begin with one page those form a group that together save most. A row is in one group at most.

    Args:
        segments: the rows' cached tokens. Each row has one query, behind all of them.
        min_saved: tokens that a group must save.
    """
    found, by_first_page = SharedPrefixes(), defaultdict[tuple[int, int], list[BatchSegment]](list)
    for segment in segments:
        if segment.first_position == 0 and segment.num_tokens >= page_size:
            by_first_page[segment.format_id, segment.pages[0]].append(segment)
        else:
            found.rest.append(segment)
    for alike in by_first_page.values():
        alike.sort(key=lambda segment: list(segment.pages))  # those with a prefix in common are neighbours now
        first, stop, num_pages = _most_saving([_common_pages(*pair, page_size) for pair in pairwise(alike)])
        if (stop - first - 1) * num_pages * page_size < min_saved:
            found.rest += alike
            continue
        found.add(alike[first:stop], num_pages, page_size)
        found.rest += alike[:first] + alike[stop:]
    return found


def _most_saving(common: Sequence[int]) -> tuple[int, int, int]:
    """Of neighbours that have so many pages in common, one with the next: the first of those that save most together,
    the one behind the last of them, and how many pages all of them have in common."""
    best, most = (0, 1, 0), 0
    for num_pages in set(common):
        first = 0
        for is_enough, pairs in groupby(common, key=num_pages.__le__):
            size = len(list(pairs))
            if is_enough and size * num_pages > most:
                best, most = (first, first + size + 1, num_pages), size * num_pages
            first += size
    return best


def _common_pages(one: BatchSegment, other: BatchSegment, page_size: int) -> int:
    """How many whole pages both begin with; at least one is known to be common."""
    low, high = 1, min(one.num_tokens, other.num_tokens) // page_size
    while low < high:
        middle = (low + high + 1) // 2
        if one.pages[:middle] == other.pages[:middle]:
            low = middle
        else:
            high = middle - 1
    return low
