"""Narrowing: a request's older pages are encoded anew in a narrower format, so that others get memory.

    before   | bf16 | bf16 | bf16 | bf16 | bf16 ..         the request goes on in bf16
    after    | int4 | int4 | int8 | bf16 | bf16 ..         and reads the older tokens as they are kept now

Oldest pages first, one format at a time: to int8 throughout before any goes to int4. The newest stay as they are.
Pages that others hold too are left alone, since encoding them anew would free nothing.
"""

import itertools
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.pages import RequestPages
from fineserve_jax.request import Request

if TYPE_CHECKING:
    from fineserve_jax.kv.manager import KVManager

MAX_RUNS = 4
"""Most runs of pages a narrowed request has, each a segment of attention; the residual page is one more."""


def ladder(kv: "KVManager", model: str, kv_format: str, floor_format: str | None) -> list[PageClass]:
    """Classes that a request's pages may be in, widest first: its own, and each narrower one down to its floor."""
    own = kv.class_of(model, kv_format)
    if floor_format is None:
        return [own]
    floor = kv.class_of(model, floor_format)
    classes = [own]
    # Of formats that take the same, the one that was asked for comes first.
    for page_class in sorted(kv.classes.values(), key=lambda other: (-other.page_bytes, other is not floor)):
        narrower = page_class.page_units < classes[-1].page_units and page_class.page_bytes >= floor.page_bytes
        if page_class.model == own.model and narrower:
            classes.append(page_class)
    return classes


@dataclass(frozen=True, slots=True)
class Narrowing:
    """What can be narrowed next of a request: its oldest pages of its widest class.

    Attributes:
        first: the first of them, counted from the first position on.
        count: how many adjacent ones there are, up to as many as were asked for.
        source, target: class they are in, and the next narrower one.
    """

    first: int
    count: int
    source: PageClass
    target: PageClass


def next_narrowing(kv: "KVManager", request: Request, most: int, keep_pages: int) -> Narrowing | None:
    """What `narrow` would take next; None if nothing is left to narrow.

    Args:
        most: most pages to take at a time.
        keep_pages: newest full pages that stay as they are.
    """
    held = kv.held[request]
    if request.min_kv_precision is None or held.waits or held.num_ready < held.num_listed:
        return None
    stop = request.num_computed_tokens // held.page_class.page_size - keep_pages
    steps = ladder(kv, request.model, request.kv_precision, request.min_kv_precision)
    for source, target in itertools.pairwise(steps):
        if kv.allocator.member(target).pool.page_units >= kv.allocator.member(source).pool.page_units:
            continue  # with pages of one length for all, narrowing frees nothing
        first = 0
        for run in held.parts(0, stop):
            if run.page_class is source:
                alone = [kv.table.holders[handle] == 1 for handle in run.handles]
                if any(alone):
                    start = alone.index(True)
                    count = sum(1 for _ in itertools.takewhile(bool, alone[start : start + most]))
                    return Narrowing(first + start, count, source, target)
            first += len(run.handles)
    return None


def narrow(kv: "KVManager", request: Request, what: Narrowing) -> int:
    """Encode pages of a request anew, as `next_narrowing` said, and free those they were in.

    Returns:
        how many pages it was: fewer than `what.count` if there is no room for more narrower ones; 0 if there is room
        for none, or if the request would have more than `MAX_RUNS` runs.
    """
    held, target = kv.held[request], what.target
    count = min(what.count, kv.allocator.allocatable(target))
    if not count or not _few_runs(held, what.first, target, count):
        return 0
    pages = kv.take({target: count})
    assert pages is not None, "that many were allocatable"
    old = held.replace(what.first, target, pages[target])
    for before, after in zip(old, pages[target], strict=True):
        kv.copy(before, after, what.source, target)
        kv.prefix.forget(before)
    kv.let_go(old)
    held.exact = False
    kv.num_narrowed_pages += count
    return count


def _few_runs(held: RequestPages, first: int, target: PageClass, count: int) -> bool:
    """Whether the request still has few enough runs once `count` pages from `first` on are of the class `target`."""
    trial = RequestPages(held.page_class)
    trial.runs = list(held.parts(0, held.num_pages))
    trial.replace(first, target, array("i", [0] * count))
    return len(trial.runs) <= MAX_RUNS
