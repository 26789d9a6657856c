"""Narrowing: a request's older pages are encoded anew in a narrower format, so that others get memory.

    before   | bf16 | bf16 | bf16 | bf16 | bf16 ..         the request goes on in bf16
    after    | int4 | int4 | int8 | bf16 | bf16 ..         and reads the older tokens as they are kept now

Oldest pages first, one format at a time; the newest stay as they are. Pages that others hold too are left alone, since
encoding them anew would free nothing.
"""

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.pages import RequestPages
from fineserve_jax.request import Request

if TYPE_CHECKING:
    from fineserve_jax.kv.manager import KVManager

MAX_RUNS = 4
"""Most runs of pages a narrowed request has, each a segment of attention; the tail is one more."""


def ladder(kv: "KVManager", request: Request) -> list[PageClass]:
    """Classes that the request's pages may be in, widest first: its own, and each narrower one down to its floor."""
    own = kv.class_of(request.model, request.kv_precision)
    if request.min_kv_precision is None:
        return [own]
    floor = kv.class_of(request.model, request.min_kv_precision)
    classes = [own]
    # Of formats that take the same, the one that was asked for comes first.
    for page_class in sorted(kv.classes.values(), key=lambda other: (-other.page_bytes, other is not floor)):
        narrower = page_class.page_units < classes[-1].page_units and page_class.page_bytes >= floor.page_bytes
        if page_class.model == own.model and narrower:
            classes.append(page_class)
    return classes


def can_narrow(kv: "KVManager", request: Request, keep_pages: int) -> bool:
    """Whether some page of the request could be encoded anew."""
    return bool(_candidates(kv, request, keep_pages))


def narrow(kv: "KVManager", request: Request, most: int, keep_pages: int) -> int:
    """Encode up to `most` of a request's pages anew, in the next narrower class, and free those they were in.

    The oldest pages of its widest class go first, so that a request is narrowed to int8 throughout before any of it
    goes to int4.

    Args:
        keep_pages: newest full pages that stay as they are.

    Returns:
        how many pages it was; 0 if there is none to narrow, or no room for even one narrower page.
    """
    candidates = _candidates(kv, request, keep_pages)
    if not candidates:
        return 0
    held = kv.held[request]
    first, source, target = candidates[0], *_step(kv, request, held, candidates[0])
    count = 1
    while count < min(most, len(candidates)) and candidates[count] == first + count:
        if _step(kv, request, held, candidates[count]) != (source, target):
            break
        count += 1
    member = kv.allocator.member(target)
    if kv.allocator.member(source).pool.page_units <= member.pool.page_units:
        return 0  # with pages of one length for all, narrowing frees nothing
    count = min(count, kv.allocator.allocatable(target))
    if not count or not _few_runs(held, first, target, count):
        return 0
    pages = kv.take({target: count})
    assert pages is not None, "that many were allocatable"
    old = held.replace(first, target, pages[target])
    for before, after in zip(old, pages[target], strict=True):
        kv.copy(before, after, source, target)
        kv.prefix.forget(before)
    kv.let_go(old)
    held.exact = False
    return count


def _candidates(kv: "KVManager", request: Request, keep_pages: int) -> Sequence[int]:
    """Pages that may be encoded anew, in the order in which they should be: adjacent ones of the widest class."""
    held = kv.held[request]
    if request.min_kv_precision is None or held.waits or held.num_ready < held.num_listed:
        return ()
    steps = ladder(kv, request)
    stop = request.num_computed_tokens // held.page_class.page_size - keep_pages
    by_class: dict[PageClass, list[int]] = {page_class: [] for page_class in steps[:-1]}
    first = 0
    for run in held.parts(0, stop):
        if run.page_class in by_class:
            alone = (i for i, handle in enumerate(run.handles, first) if kv.table.holders[handle] == 1)
            by_class[run.page_class] += alone
        first += len(run.handles)
    return next((pages for pages in by_class.values() if pages), ())


def _step(kv: "KVManager", request: Request, held: RequestPages, page: int) -> tuple[PageClass, PageClass]:
    """The class of a page, and the next narrower one."""
    steps = ladder(kv, request)
    source = held.page(page)[0]
    return source, steps[steps.index(source) + 1]


def _few_runs(held: RequestPages, first: int, target: PageClass, count: int) -> bool:
    """Whether the request still has few enough runs once `count` pages from `first` on are of the class `target`."""
    trial = RequestPages(held.page_class)
    trial.runs = list(held.parts(0, held.num_pages))
    trial.replace(first, target, array("i", [0] * count))
    return len(trial.runs) <= MAX_RUNS
