"""Bytes that cached tokens need, and bytes that are reserved for them."""

from collections import defaultdict
from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.request_pages import GroupPages
from fineserve_jax.kv.stats import AllocatorStats, ClassStats, allocator_stats


@dataclass(frozen=True, slots=True)
class FormatUsage:
    """The pages of one KV precision, over all models; residual pages count under their own format.

    Attributes:
        needed_bytes: exact bytes of the cached tokens' values and scales, in layers with a window of those inside it.
        reserved_bytes: bytes of the slabs that serve the format, free pages included, less `cached_bytes`.
        cached_bytes: bytes of pages that nobody holds, kept for requests that begin alike until memory is wanted.
        free_bytes: bytes it could still take; a free slab counts for every format that may take it.
        cached_tokens: tokens whose K and V lie in pages of the format; where layers differ, in those that keep most.
        owned_pages: pages that requests hold.
    """

    needed_bytes: int
    reserved_bytes: int
    cached_bytes: int
    free_bytes: int
    cached_tokens: int
    owned_pages: int


@dataclass(frozen=True, slots=True)
class KVUsage:
    """The cache as a whole; `free_bytes` counts every free slab once."""

    formats: dict[str, FormatUsage]
    needed_bytes: int
    reserved_bytes: int
    cached_bytes: int
    free_bytes: int
    usable_bytes: int
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class KVCounts:
    """What was done with pages since the start.

    Attributes:
        asked_tokens, hit_tokens: tokens of requests that started, and those of them whose pages were found.
        converted_pages: pages found in a wider format and requantized.
        evicted_pages: cached pages evicted because memory was wanted.
        narrowed_pages: pages of running requests requantized to a narrower format.
        moved_pages: pages moved together so that slabs became free.
        saved_requests: preempted requests whose pages went to host memory.
    """

    asked_tokens: int
    hit_tokens: int
    converted_pages: int
    evicted_pages: int
    narrowed_pages: int
    moved_pages: int
    saved_requests: int


def count_events(kv: KVManager) -> KVCounts:
    """What was done with pages since the start."""
    found = kv.pool.prefix_cache.stats
    return KVCounts(
        asked_tokens=found.asked_tokens,
        hit_tokens=found.hit_tokens,
        converted_pages=found.converted_pages,
        evicted_pages=found.evicted_pages,
        narrowed_pages=kv.num_narrowed_pages,
        moved_pages=kv.pool.compaction.num_pages,
        saved_requests=kv.host.num_saved,
    )


def measure_classes(kv: KVManager) -> dict[PageClass, ClassStats]:
    """Slabs, pages and bytes of each page class."""
    return allocator_stats(kv.pool.allocator).classes


def measure_usage(kv: KVManager) -> KVUsage:
    """Bytes needed, reserved and free, by format and in all."""
    allocator = kv.pool.allocator
    stats, tokens = allocator_stats(allocator), _cached_tokens(kv)
    cached_bytes = kv.pool.prefix_cache.evictable_units * allocator.unit_bytes
    formats = {
        precision: _format_usage(kv, precision, stats, tokens)
        for precision in dict.fromkeys(page_class.precision for page_class in stats.classes)
    }
    return KVUsage(
        formats=formats,
        needed_bytes=sum(usage.needed_bytes for usage in formats.values()),
        reserved_bytes=stats.reserved_bytes - cached_bytes,
        cached_bytes=cached_bytes,
        free_bytes=stats.free_bytes,
        usable_bytes=stats.usable_slabs * stats.slab_bytes,
        cached_tokens=sum(usage.cached_tokens for usage in formats.values()),
    )


def _cached_tokens(kv: KVManager) -> dict[PageClass, int]:
    """Tokens in the cache that later ones attend to, by the class of page that each lies in; those in shared pages
    once."""
    tokens: defaultdict[PageClass, int] = defaultdict(int)
    seen: dict[int, int] = {}
    for request, held in kv.held.items():
        for group in held.groups:
            _count_tokens(kv, group, request.num_computed_tokens, seen, tokens)
    return tokens


def _count_tokens(
    kv: KVManager, group: GroupPages, cached: int, seen: dict[int, int], tokens: defaultdict[PageClass, int]
) -> None:
    """Adds the tokens of a group. `seen`: from which position on a shared page is counted already."""
    own, ref_counts = group.page_class, kv.pool.table.ref_counts
    size, first = own.page_size, own.first_token(cached)
    page = max(group.num_dropped, first // size)
    stop = own.num_pages(cached)
    begin = max(first, page * size)
    for run in group.parts(page, stop):
        end = min(cached, (page + len(run.handles)) * size)
        tokens[run.page_class] += end - begin
        for index, handle in enumerate(run.handles, page):
            if ref_counts[handle] > 1:
                first_here, end_here = max(begin, index * size), min(end, (index + 1) * size)
                tokens[run.page_class] -= end_here - max(first_here, min(seen.get(handle, end_here), end_here))
                seen[handle] = min(first_here, seen.get(handle, end_here))
        page, begin = page + len(run.handles), end
    if own.residual is not None:
        tokens[own.residual] += cached - max(first, stop * size)


def _format_usage(kv: KVManager, precision: str, stats: AllocatorStats, tokens: dict[PageClass, int]) -> FormatUsage:
    allocator, evictable = kv.pool.allocator, kv.pool.prefix_cache.evictable_pages
    classes = [page_class for page_class in stats.classes if page_class.precision == precision]
    pools = {allocator.members[page_class].pool for page_class in classes}
    free_slabs = max(allocator.available_slabs(pool) for pool in pools)
    free_units = sum(pool.free_pages * pool.page_units for pool in pools)
    cached_bytes = sum(evictable[c] * allocator.page_units(c) for c in classes) * allocator.unit_bytes
    return FormatUsage(
        needed_bytes=sum(-(-tokens[c] * c.page_bytes // c.page_size) for c in classes),
        reserved_bytes=sum(stats.classes[c].reserved_bytes for c in classes) - cached_bytes,
        cached_bytes=cached_bytes,
        free_bytes=free_units * allocator.unit_bytes + free_slabs * stats.slab_bytes,
        cached_tokens=sum(tokens[c] for c in classes if not c.group),
        owned_pages=sum(stats.classes[c].owned_pages - evictable[c] for c in classes),
    )
