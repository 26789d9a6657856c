"""Narrowing: a request's older pages are requantized to a narrower format, so that others get memory.

    before   | bf16 | bf16 | bf16 | bf16 | bf16 ..         the request goes on in bf16
    after    | int4 | int4 | int8 | bf16 | bf16 ..         and reads the older tokens as they are kept now

Oldest pages first, one format at a time: to int8 throughout before any goes to int4. The newest stay as they are.
Pages that others hold too are left alone, since requantizing them would free nothing.
"""

import itertools
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass, PageClasses
from fineserve_jax.kv.page_pool import PagePool
from fineserve_jax.kv.request_pages import GroupPages, RequestPages
from fineserve_jax.request.request import Request

MAX_RUNS = 4
"""Most runs of pages a narrowed request has in a layer group, each a segment of attention; the residual page is one
more."""


def ladder(classes: PageClasses, model: str, kv_format: str, floor_format: str | None) -> list[PageClass]:
    """Classes that a request's pages may be in, widest first: its own, and each narrower one down to its floor. Recipes
    are among them only as the first and the last."""
    own = classes[model, kv_format]
    if floor_format is None:
        return [own]
    floor, steps = classes[model, floor_format], [own]
    of_model = [page_class for page_class in classes.values() if page_class.model == own.model]
    # Of formats that take the same, the one that was asked for comes first.
    for page_class in sorted(of_model, key=lambda other: (-other.bytes_of_groups, other is not floor)):
        between = steps[-1].holds_at_least(page_class) and page_class.holds_at_least(floor)
        may_be = page_class.recipe is None or page_class is floor
        if may_be and between and _saves_units(steps[-1], page_class):
            steps.append(page_class)
    return steps


def _saves_units(wider: PageClass, narrower: PageClass) -> bool:
    """Whether pages of some layer group take fewer units."""
    pairs = zip(wider.groups, narrower.groups, strict=True)
    return any(theirs.page_units < own.page_units for own, theirs in pairs)


@dataclass(frozen=True, slots=True)
class Requantization:
    """Pages of a request that can be requantized next: the oldest ones of its widest format.

    Attributes:
        group: the layer group whose pages they are.
        first: the first of them, counted from the first position on.
        count: how many adjacent ones there are, up to as many as were asked for.
        source, target: class they are in, and the next narrower one.
    """

    group: int
    first: int
    count: int
    source: PageClass
    target: PageClass


def next_requantization(
    pool: PagePool, request: Request, held: RequestPages, steps: Sequence[PageClass], most: int, keep_pages: int
) -> Requantization | None:
    """What `requantize_pages` would take next; None if nothing is left to narrow.

    Args:
        held: what the request holds.
        steps: its `ladder`.
        most: most pages to take at a time.
        keep_pages: newest full pages that stay as they are.
    """
    if held.waits or held.num_ready < held.num_cached_blocks:
        return None
    ref_counts, stop = pool.table.ref_counts, request.num_computed_tokens // held.page_class.page_size - keep_pages
    for wider, narrower in itertools.pairwise(steps):
        for number, (group, source, target) in enumerate(zip(held.groups, wider.groups, narrower.groups, strict=True)):
            if pool.allocator.page_units(target) >= pool.allocator.page_units(source):
                continue  # with pages of one length for all, narrowing frees nothing
            if (found := _oldest_alone(group, source, stop, most, ref_counts)) is not None:
                return Requantization(number, *found, source, target)
    return None


def _oldest_alone(
    group: GroupPages, source: PageClass, stop: int, most: int, ref_counts: Sequence[int]
) -> tuple[int, int] | None:
    """The first of the oldest pages of a class ahead of `stop` that nobody else holds, and how many adjacent ones there
    are, up to `most`; None if there is none."""
    first = group.num_dropped
    for run in group.parts(0, stop):
        if run.page_class is source:
            alone = [ref_counts[handle] == 1 for handle in run.handles]
            if any(alone):
                start = alone.index(True)
                return first + start, sum(1 for _ in itertools.takewhile(bool, alone[start : start + most]))
        first += len(run.handles)
    return None


def most_freed_units(held: RequestPages, floor: PageClass, stop: int) -> int:
    """Units that requantizing all pages ahead of `stop` to the class `floor` would free, shared ones too."""
    total = 0
    for group, narrowest in zip(held.groups, floor.groups, strict=True):
        least = narrowest.page_units
        total += sum(max(0, run.page_class.page_units - least) * len(run.handles) for run in group.parts(0, stop))
    return total


def requantize_pages(pool: PagePool, held: RequestPages, what: Requantization) -> int:
    """Requantize pages of a request, as `next_requantization` said, and free those they were in.

    Returns:
        how many pages it was: fewer than `what.count` if there is no room for more narrower ones; 0 if there is room
        for none, or if the request would have more than `MAX_RUNS` runs.
    """
    target, group = what.target, held.groups[what.group]
    count = min(what.count, pool.allocator.allocatable(target))
    if not count or not _few_runs(group, what.first, target, count):
        return 0
    pages = pool.take({target: count})
    assert pages is not None, "that many were allocatable"
    old = group.replace(what.first, target, pages[target])
    for before, after in zip(old, pages[target], strict=True):
        pool.copy(before, after, what.source, target)
        pool.prefix_cache.remove(before)
    pool.decref(old)
    held.exact = False
    return count


def _few_runs(group: GroupPages, first: int, target: PageClass, count: int) -> bool:
    """Whether the request still has few enough runs once `count` pages from `first` on are of the class `target`."""
    runs = list(group.parts(0, group.num_pages))
    trial = GroupPages(group.page_class, runs, num_dropped=group.num_dropped)
    trial.replace(first, target, array("i", [0] * count))
    return len(trial.runs) <= MAX_RUNS
