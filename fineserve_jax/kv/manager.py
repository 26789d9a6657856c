"""The host half of the KV cache: which pages each request holds.

Pages of a format that encodes token by token hold tokens from the first position on. A format that encodes
whole pages keeps its newest, unfilled page in a wider format, its *tail*:

    positions   0 .. T-1   T .. 2T-1   2T .. 2T+k-1
    int8        pages[0]   pages[1]    pages[2], filled up to k
    int4        pages[0]   pages[1]    tail (bf16); when full it is encoded into pages[2] and begins anew
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.errors import IntegrityError, PageError
from fineserve_jax.kv.slabs import SlabAllocator
from fineserve_jax.kv.usage import KVUsage, measure_usage
from fineserve_jax.request import Request


@dataclass(slots=True)
class RequestPages:
    """What one request holds.

    Attributes:
        page_class: class of `pages`; the tail is of `page_class.tail`.
        pages: first units, in the order of positions.
        tail: first unit of the tail page; None for a format without one, and before the first page.
    """

    page_class: PageClass
    pages: list[int] = field(default_factory=list)
    tail: int | None = None


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of a request's cached tokens in one format: `num_tokens` from `first_position` on, in `pages`."""

    kv_format: str
    pages: list[int]
    first_position: int
    num_tokens: int


class KVManager:
    """Gives requests pages as they grow and takes them back, all-or-nothing.

    Args:
        allocator: owner of the arena's pages; nobody else may allocate from it.
        classes: page class of each model and KV format that requests may name.
    """

    def __init__(self, allocator: SlabAllocator, classes: Mapping[tuple[str, str], PageClass]) -> None:
        self.allocator = allocator
        self.classes: dict[tuple[str, str], PageClass] = {}
        self.held: dict[Request, RequestPages] = {}
        for page_class in classes.values():
            self.register(page_class)

    def register(self, page_class: PageClass) -> None:
        """Serve requests of a further model and format."""
        self.allocator.register(page_class)
        self.classes[page_class.model, page_class.kv_format] = page_class

    def class_of(self, model: str, kv_format: str) -> PageClass:
        """Page class of a model and KV format.

        Raises:
            ConfigError: a pair that the cache was not set up for.
        """
        try:
            return self.classes[model, kv_format]
        except KeyError:
            known = ", ".join(f"{model}/{kv_format}" for model, kv_format in self.classes) or "none"
            raise ConfigError(f"no KV cache for {model}/{kv_format}; this engine has: {known}") from None

    # -- growing and shrinking -----------------------------------------------------------------------------

    def holds(self, request: Request) -> RequestPages:
        """What the request holds, to read only; empty for one that holds nothing."""
        held = self.held.get(request)
        return RequestPages(self.class_of(request.model, request.kv_precision)) if held is None else held

    def demand(self, request: Request, num_tokens: int) -> dict[PageClass, int]:
        """Pages the request still lacks, by class, so that its first `num_tokens` tokens have a home."""
        held = self.held.get(request)
        if held is None:
            return self.class_of(request.model, request.kv_precision).demand(num_tokens)
        lacking = held.page_class.num_pages(num_tokens) - len(held.pages)
        return {held.page_class: lacking} if lacking > 0 else {}

    def can_grow(self, request: Request, num_tokens: int) -> bool:
        """Whether `grow` of the same would succeed now."""
        return self.allocator.can_allocate(self.demand(request, num_tokens))

    def grow(self, request: Request, num_tokens: int) -> bool:
        """Give the request all pages that its first `num_tokens` tokens need, or none; it never shrinks."""
        demand = self.demand(request, num_tokens)
        if not demand:
            return True
        pages = self.allocator.allocate(demand)
        if pages is None:
            return False
        held = self.held.get(request)
        if held is None:
            page_class = self.class_of(request.model, request.kv_precision)
            held = self.held[request] = RequestPages(page_class)
            if page_class.tail is not None:
                (held.tail,) = pages.pop(page_class.tail)
        held.pages += pages.get(held.page_class, ())
        return True

    def release(self, request: Request) -> None:
        """Take back all that the request holds; nothing to do for one that holds nothing."""
        held = self.held.pop(request, None)
        if held is None:
            return
        self.allocator.free(held.page_class, held.pages)
        if held.page_class.tail is not None and held.tail is not None:
            self.allocator.free(held.page_class.tail, [held.tail])

    # -- what would fit ------------------------------------------------------------------------------------

    def fits_alone(self, model: str, kv_format: str, num_tokens: int) -> bool:
        """Whether an otherwise empty arena could hold a request of that many tokens, quotas respected."""
        return self.allocator.fits_empty(self.class_of(model, kv_format).demand(num_tokens))

    def max_tokens_alone(self, model: str, kv_format: str) -> int:
        """Most tokens that a request could have in an otherwise empty arena; 0 if none fits."""
        page_class = self.class_of(model, kv_format)
        fits, too_many = 0, (self.allocator.num_units + 1) * page_class.page_size
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self.allocator.fits_empty(page_class.demand(middle)):
                fits = middle
            else:
                too_many = middle
        return fits

    # -- what is where -------------------------------------------------------------------------------------

    def segments(self, request: Request, num_cached: int) -> list[Segment]:
        """Where the first `num_cached` tokens of a request are, in the order of positions; no empty segments.

        Raises:
            PageError: more tokens than the request has pages for.
        """
        if lacking := self.demand(request, num_cached):
            short = ", ".join(f"{count} of {page_class}" for page_class, count in lacking.items())
            raise PageError(f"request {request.request_id}: {num_cached} tokens need {short} more; grow it first")
        held = self.holds(request)
        page_class, size = held.page_class, held.page_class.page_size
        num_pages = page_class.num_pages(num_cached)
        in_pages = min(num_cached, num_pages * size)
        segments = []
        if in_pages:
            segments.append(Segment(page_class.kv_format, held.pages[:num_pages], 0, in_pages))
        if page_class.tail is not None and held.tail is not None and num_cached > in_pages:
            segments.append(Segment(page_class.tail.kv_format, [held.tail], in_pages, num_cached - in_pages))
        return segments

    # -- accounts ------------------------------------------------------------------------------------------

    def usage(self) -> KVUsage:
        """Bytes needed, reserved and free, by format and in all."""
        return measure_usage(self)

    def check_integrity(self) -> None:
        """Check the allocator's books, and that requests hold exactly the pages it has out, each page once.

        Raises:
            IntegrityError: naming what does not add up.
        """
        self.allocator.check_integrity()
        pages: dict[PageClass, list[int]] = {page_class: [] for page_class in self.allocator.members}
        for held in self.held.values():
            pages[held.page_class] += held.pages
            if held.page_class.tail is not None and held.tail is not None:
                pages[held.page_class.tail].append(held.tail)
        for page_class, listed in pages.items():
            held_units, owned_units = (
                np.sort(np.array(listed, np.int64)),
                self.allocator.owned_pages(page_class),
            )
            repeated = held_units[1:][held_units[1:] == held_units[:-1]]
            if repeated.size:
                raise IntegrityError(f"page {repeated[0]} of {page_class} is held twice")
            odd = np.setxor1d(held_units, owned_units, assume_unique=True)
            if odd.size:
                who = "held by a request but not allocated" if odd[0] in held_units else "allocated but held by nobody"
                raise IntegrityError(f"page {odd[0]} of {page_class} is {who} ({odd.size} such pages)")
