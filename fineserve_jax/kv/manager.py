"""The host half of the KV cache: which pages each request holds.

    grow      pages for more tokens; a new request gets what it can share: a prefix, or another sample's pages
    release   all pages back; full ones stay as a cached prefix until their memory is wanted
    take_operations             what the device has to copy before the next step

Sharing (`sharing`), narrowing (`narrowing`), compaction (`compaction`) and host memory (`host_memory`) work on the
same books.
"""

import itertools
from array import array
from collections.abc import Mapping, Sequence

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.compaction import Compaction
from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.host_memory import HostMemory
from fineserve_jax.kv.integrity import check_manager
from fineserve_jax.kv.narrowing import Narrowing, narrow, next_narrowing
from fineserve_jax.kv.operations import Copy, PageOperation
from fineserve_jax.kv.pages import RequestPages, Segment
from fineserve_jax.kv.pool import Share
from fineserve_jax.kv.prefix import PrefixCache
from fineserve_jax.kv.sharing import Sharing
from fineserve_jax.kv.slabs import SlabAllocator
from fineserve_jax.kv.table import Handles, PageTable
from fineserve_jax.kv.usage import KVCounts, KVUsage, count_events, measure_usage
from fineserve_jax.request import Request

Demand = Mapping[PageClass, int]
MOST_EVICTED_AT_A_TIME = 8
"""Cached pages that are evicted before it is asked again whether there is room; fewer where few are cached."""


class KVManager:
    """Gives requests pages as they grow and takes them back, all-or-nothing.

    Args:
        allocator: owner of the arena's pages; nobody else may allocate from it.
        classes: page class of each model and KV format that requests may name.
        prefix_cache: see `sharing`.
        reserve_slabs: free slabs that eviction and compaction keep at hand, and that admission leaves alone.
        host_bytes: most bytes of preempted requests' pages to keep in host memory.

    Attributes:
        held: what each request holds.
        prefix: full pages by what they hold.
        compaction, host: see there.
        num_narrowed_pages: pages encoded anew in a narrower format since the start.
    """

    def __init__(
        self,
        allocator: SlabAllocator,
        classes: Mapping[tuple[str, str], PageClass],
        *,
        prefix_cache: str = "exact",
        reserve_slabs: int = 0,
        host_bytes: int = 0,
    ) -> None:
        self.allocator = allocator
        self.table = PageTable()
        self.prefix = PrefixCache(allocator.page_units)
        self.reserve_slabs = reserve_slabs
        self.sharing = Sharing(self, prefix_cache)
        self.compaction = Compaction(self)
        self.host = HostMemory(self, host_bytes)
        self.classes: dict[tuple[str, str], PageClass] = {}
        self.held: dict[Request, RequestPages] = {}
        self.num_narrowed_pages = 0
        self._operations: list[PageOperation] = []
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
        """Pages the request still lacks, by class, so that its first `num_tokens` tokens have a home; for one that
        holds nothing, as if it shared nothing."""
        held = self.held.get(request)
        if held is None:
            return self.class_of(request.model, request.kv_precision).demand(num_tokens)
        lacking = held.page_class.num_pages(num_tokens) - held.num_pages
        return {held.page_class: lacking} if lacking > 0 else {}

    def grow(self, request: Request, num_tokens: int, leaving: Demand | None = None) -> bool:
        """Give the request all pages that its first `num_tokens` tokens need, or none; it never shrinks.

        A request that holds nothing may find some of them: saved in host memory, held by the sample it is forked
        from, or in the prefix cache. Its `num_computed_tokens` is set to what these hold.

        Args:
            leaving: pages that must be left for others; besides, `reserve_slabs` are. None: nothing need be left.
        """
        held = self.held.get(request)
        if held is None:
            return self._start(request, num_tokens, leaving)
        demand = self.demand(request, num_tokens)
        if not demand:
            return True
        pages = self.take(demand, leaving)
        if pages is None:
            return False
        held.append(held.page_class, pages[held.page_class])
        return True

    def grow_together(self, requests: Sequence[Request]) -> bool:
        """Give each of some requests that hold pages all those that its known tokens need, or none of them any."""
        lacking = [(self.held[request], self.demand(request, request.num_tokens)) for request in requests]
        joint: dict[PageClass, int] = {}
        for _, demand in lacking:
            for page_class, count in demand.items():
                joint[page_class] = joint.get(page_class, 0) + count
        pages = self.take(joint) if joint else {}
        if pages is None:
            return False
        for held, demand in lacking:
            for page_class, count in demand.items():
                held.append(page_class, pages[page_class][-count:])
                del pages[page_class][-count:]
        return True

    def release(self, request: Request) -> None:
        """Take back all that the request holds; nothing to do for one that holds nothing."""
        self.host.forget(request)
        held = self.held.pop(request, None)
        if held is None:
            return
        handles = array("i")
        for run in held.runs:
            handles.extend(run.handles)
        for handle in handles[held.num_ready : held.num_listed]:
            listed = self.prefix.by_handle.get(handle)
            if listed is not None and listed.writer is request:
                listed.writer = None
        self.let_go(handles[::-1])  # so that a prefix is evicted from its end on
        if held.residual is not None:
            self.let_go([held.residual])

    def _start(self, request: Request, num_tokens: int, leaving: Demand | None) -> bool:
        if request in self.host.saved:
            return self.host.load(request, num_tokens, leaving)
        return self.sharing.fork(request, num_tokens, leaving) or self.sharing.start(request, num_tokens, leaving)

    # -- pages, for the parts of this package ----------------------------------------------------------------

    def take(self, demand: Demand, leaving: Demand | None = None) -> "dict[PageClass, array[int]] | None":
        """Handles of new pages, or None if they cannot all be had even after evicting what nobody holds."""
        wanted = dict(demand)
        for page_class, count in (leaving or {}).items():
            wanted[page_class] = wanted.get(page_class, 0) + count
        spare_slabs = 0 if leaving is None else self.reserve_slabs
        if not self.make_room(wanted, spare_slabs, at_once=leaving is None):
            return None
        units = self.allocator.allocate(demand)
        assert units is not None, "what fits with others left room fits without"
        return {
            page_class: self.table.add(pages, self.allocator.member(page_class).tag)
            for page_class, pages in units.items()
        }

    def lacking_units(self, wanted: Demand, spare_slabs: int = 0) -> int:
        """Units that are wanted beyond those free or in pages that nobody holds; 0 or less: none."""
        allocator = self.allocator
        units = sum(allocator.page_units(page_class) * count for page_class, count in wanted.items())
        return units + spare_slabs * allocator.slab_units - allocator.free_units - self.prefix.idle_units

    def make_room(self, wanted: Demand, spare_slabs: int = 0, *, at_once: bool = False, patient: bool = False) -> bool:
        """Whether that many pages can be had now, pages that nobody holds evicted and pages moved as need be.

        Args:
            at_once: do not leave to later steps what is too much to move in one.
            patient: evict nothing while pages that could be moved are left to later steps.
        """
        allocator = self.allocator
        if allocator.can_allocate(wanted, spare_slabs):
            return True
        if self.lacking_units(wanted, spare_slabs) > 0:
            return False
        shares = {allocator.member(page_class).pool.share for page_class in wanted}
        idle, at_a_time = self.prefix.least_recent(), min(1 + len(self.prefix.idle) // 64, MOST_EVICTED_AT_A_TIME)
        while not allocator.can_allocate(wanted, spare_slabs):
            if self.compaction.move():
                continue
            is_early = patient and self.compaction.is_cut_short
            handles = [] if is_early else list(itertools.islice(idle, at_a_time))
            if not handles:
                if at_once and self.compaction.move(at_once=True):
                    continue
                return False
            # A slab of any share's may be a spare one, if those are what is wanting.
            if len(allocator.free_slabs) >= spare_slabs:
                handles = [handle for handle in handles if self._share_of(handle) in shares]
            self._evict(handles)
        return True

    def forget_prefixes(self) -> None:
        """Give up all pages that nobody holds."""
        self._evict(list(self.prefix.idle))

    def begin_step(self) -> None:
        """To be called once before each step: restores the reserve of free slabs, as far as that moves or evicts
        pages that nobody holds."""
        self.compaction.begin_step()
        if len(self.allocator.free_slabs) < self.reserve_slabs:
            self.make_room({}, self.reserve_slabs, patient=True)

    def _share_of(self, listed: int) -> Share:
        return self.allocator.member(self.prefix.by_handle[listed].page_class).pool.share

    def _evict(self, handles: Handles) -> None:
        for handle in handles:
            self.prefix.forget(handle)
        self.prefix.stats.evicted_pages += len(handles)
        self._free(handles)

    def let_go(self, handles: Handles) -> None:
        """One holder less of each page; those without any are freed unless the prefix cache keeps them."""
        self._free(self.prefix.keep(self.table.drop(handles)))

    def share(self, handles: Handles) -> None:
        """One holder more of each page."""
        for handle in handles:
            self.prefix.hold(handle)
        self.table.share(handles)

    def _free(self, handles: Handles) -> None:
        for tag, same in self.table.by_tag(handles).items():
            self.allocator.free(self.allocator.by_tag[tag].page_class, self.table.remove(same))

    def ask(self, operation: PageOperation) -> None:
        """Queue an operation for the device."""
        self._operations.append(operation)

    def copy_units(self, source: int, target: int, page_class: PageClass) -> None:
        """Queue the copy of a page, first unit to first unit."""
        self.ask(Copy(source, target, page_class, page_class))

    def copy(self, source: int, target: int, source_class: PageClass, target_class: PageClass) -> None:
        """Queue the copy of a page, handle to handle."""
        units = self.table.units
        self.ask(Copy(units[source], units[target], source_class, target_class))

    def take_operations(self) -> list[PageOperation]:
        """What the device has to do, in this order, before it computes the next step."""
        operations, self._operations = self._operations, []
        return operations

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
        size, segments, first = held.page_class.page_size, [], 0
        for run in held.parts(0, held.page_class.num_pages(num_cached)):
            count = min(num_cached - first, len(run.handles) * size)
            segments.append(Segment(run.page_class.kv_format, self.table.units_of(run.handles), first, count))
            first += count
        if held.residual is not None and held.page_class.residual is not None and num_cached > first:
            residual = self.table.units_of([held.residual])
            segments.append(Segment(held.page_class.residual.kv_format, residual, first, num_cached - first))
        return segments

    def first_units(self, request: Request, first: int, count: int) -> list[int]:
        """First units of `count` of the request's pages from the page `first` on, the residual page aside."""
        parts = self.holds(request).parts(first, first + count)
        return [unit for run in parts for unit in self.table.units_of(run.handles)]

    def page_unit(self, request: Request, page: int) -> int:
        """First unit of one of the request's pages, the residual page aside."""
        return self.table.units[self.held[request].page(page)[1]]

    def residual_unit(self, request: Request) -> int | None:
        """First unit of the request's residual page, if it has one."""
        residual = self.holds(request).residual
        return None if residual is None else self.table.units[residual]

    def tokens_by_format(self, request: Request) -> dict[str, int]:
        """How many of the request's computed tokens are kept in each KV format, oldest first."""
        tokens: dict[str, int] = {}
        for segment in self.segments(request, request.num_computed_tokens if request in self.held else 0):
            tokens[segment.kv_format] = tokens.get(segment.kv_format, 0) + segment.num_tokens
        return tokens

    # -- for the scheduler ---------------------------------------------------------------------------------

    @property
    def is_compacting(self) -> bool:
        """Whether more pages would have been moved together in this step than may be moved in one."""
        return self.compaction.is_cut_short

    @property
    def num_free_slabs(self) -> int:
        """Slabs that no page lies in."""
        return len(self.allocator.free_slabs)

    def page_units(self, page_class: PageClass) -> int:
        """Units that a page of the class takes."""
        return self.allocator.page_units(page_class)

    def share_names(self, page_class: PageClass) -> frozenset[str]:
        """Memory shares that the pages of a request in the class, its residual page included, count against."""
        classes = [page_class] if page_class.residual is None else [page_class, page_class.residual]
        return frozenset(map(self.allocator.policy.share_name, classes))

    def can_advance(self, request: Request) -> bool:
        """Whether the request has something to compute now: not while another computes the page it needs next.

        Moves its `num_computed_tokens` past what others have computed meanwhile.
        """
        return self.sharing.can_go_on(request)

    def note_computed(self, request: Request) -> None:
        """The request's first `num_computed_tokens` tokens are in its pages: its full ones are ready to be shared."""
        self.sharing.note_computed(request)

    def can_save(self, request: Request) -> bool:
        """Whether the request's pages may be saved: they are computed, in one format, and host memory has room."""
        held = self.held[request]
        # Pages in several formats take slabs of several: alone they might not fit where those of one format do.
        return not held.waits and held.exact and self.host.has_room(request)

    def save_bytes(self, request: Request) -> int:
        """Bytes that saving the request takes."""
        return self.host.num_bytes(request)

    def save(self, request: Request) -> None:
        """Queue the copy of a request's pages to host memory, and take them back; only what `can_save` allows."""
        self.host.save(request)

    def next_requantization(self, request: Request, most: int, keep_pages: int) -> Narrowing | None:
        """What `requantize_pages` would take next; None if nothing is left to narrow.

        Args:
            most: most pages to take at a time.
            keep_pages: newest full pages that stay as they are.
        """
        return next_narrowing(self, request, most, keep_pages)

    def requantize_pages(self, request: Request, what: Narrowing) -> int:
        """Encode pages of a request anew, as `next_requantization` said; how many, perhaps fewer or 0."""
        return narrow(self, request, what)

    # -- accounts ------------------------------------------------------------------------------------------

    def usage(self) -> KVUsage:
        """Bytes needed, reserved and free, by format and in all."""
        return measure_usage(self)

    def counts(self) -> KVCounts:
        """What was done with pages since the start."""
        return count_events(self)

    def check_integrity(self, thorough: bool = True) -> None:
        """Check the allocator's books, and that pages are held by exactly those who are counted as their holders.

        Args:
            thorough: check the prefix cache page by page, too; without, it costs little enough for every step.

        Raises:
            IntegrityError: naming what does not add up.
        """
        check_manager(self, thorough)
