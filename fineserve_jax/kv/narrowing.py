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
from fineserve_jax.kv.request_pages import RequestPages
from fineserve_jax.request import Request

MAX_RUNS = 4
"""Most runs of pages a narrowed request has, each a segment of attention; the residual page is one more."""


def ladder(classes: PageClasses, model: str, kv_format: str, floor_format: str | None) -> list[PageClass]:
    """Classes that a request's pages may be in, widest first: its own, and each narrower one down to its floor."""
    own = classes[model, kv_format]
    if floor_format is None:
        return [own]
    floor, steps = classes[model, floor_format], [own]
    # Of formats that take the same, the one that was asked for comes first.
    for page_class in sorted(classes.values(), key=lambda other: (-other.page_bytes, other is not floor)):
        narrower = page_class.page_units < steps[-1].page_units and page_class.page_bytes >= floor.page_bytes
        if page_class.model == own.model and narrower:
            steps.append(page_class)
    return steps


@dataclass(frozen=True, slots=True)
class Requantization:
    """Pages of a request that can be requantized next: its oldest ones of its widest class.

    Attributes:
        first: the first of them, counted from the first position on.
        count: how many adjacent ones there are, up to as many as were asked for.
        source, target: class they are in, and the next narrower one.
    """

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
    for source, target in itertools.pairwise(steps):
        if pool.allocator.page_units(target) >= pool.allocator.page_units(source):
            continue  # with pages of one length for all, narrowing frees nothing
        first = 0
        for run in held.parts(0, stop):
            if run.page_class is source:
                alone = [ref_counts[handle] == 1 for handle in run.handles]
                if any(alone):
                    start = alone.index(True)
                    count = sum(1 for _ in itertools.takewhile(bool, alone[start : start + most]))
                    return Requantization(first + start, count, source, target)
            first += len(run.handles)
    return None


def requantize_pages(pool: PagePool, held: RequestPages, what: Requantization) -> int:
    """Requantize pages of a request, as `next_requantization` said, and free those they were in.

    Returns:
        how many pages it was: fewer than `what.count` if there is no room for more narrower ones; 0 if there is room
        for none, or if the request would have more than `MAX_RUNS` runs.
    """
    target = what.target
    count = min(what.count, pool.allocator.allocatable(target))
    if not count or not _few_runs(held, what.first, target, count):
        return 0
    pages = pool.take({target: count})
    assert pages is not None, "that many were allocatable"
    old = held.replace(what.first, target, pages[target])
    for before, after in zip(old, pages[target], strict=True):
        pool.copy(before, after, what.source, target)
        pool.prefix_cache.remove(before)
    pool.decref(old)
    held.exact = False
    return count


def _few_runs(held: RequestPages, first: int, target: PageClass, count: int) -> bool:
    """Whether the request still has few enough runs once `count` pages from `first` on are of the class `target`."""
    trial = RequestPages(held.page_class)
    trial.runs = list(held.parts(0, held.num_pages))
    trial.replace(first, target, array("i", [0] * count))
    return len(trial.runs) <= MAX_RUNS
