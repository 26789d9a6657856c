"""The host half of the KV cache: which pages each request holds.

Pages come from a pool (`page_pool`). What a new request can share is found by `sharing`; `narrowing` and `host_memory`
work on what requests hold, too. Audits and accounts of all of it are functions (`integrity`, `usage`).
"""

import itertools
from array import array
from collections import Counter
from collections.abc import KeysView, Mapping, Sequence

from fineserve_jax.kv import narrowing
from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass, PageClasses
from fineserve_jax.kv.errors import PageError
from fineserve_jax.kv.host_memory import HostMemory
from fineserve_jax.kv.narrowing import Requantization
from fineserve_jax.kv.operations import PageOperation
from fineserve_jax.kv.page_pool import Demand, PagePool
from fineserve_jax.kv.request_pages import RequestPages, Segment, no_pages
from fineserve_jax.kv.sharing import Sharing
from fineserve_jax.request.request import Request


class KVManager:
    """Gives requests pages as they grow and takes them back, all-or-nothing.

    Args:
        allocator: owner of the arena's pages; nobody else may allocate from it.
        classes: page class of each model and KV format that requests may name.
        prefix_cache: see `sharing`.
        reserve_slabs: free slabs that eviction and compaction keep at hand, and that admission leaves alone.
        host_bytes: most bytes of preempted requests' pages to keep in host memory.
        compacts: whether pages are moved together so that slabs become free; off only to compare.
        chunk_pages: see `sharing`.

    Attributes:
        classes: page class of each model and KV format.
        num_narrowed_pages: pages requantized to a narrower format since the start.
        pool, held, sharing, host: the parts of the manager, for modules of `kv/` only.
    """

    def __init__(
        self,
        allocator: SlabAllocator,
        classes: Mapping[tuple[str, str], PageClass],
        *,
        prefix_cache: str = "exact",
        reserve_slabs: int = 0,
        host_bytes: int = 0,
        compacts: bool = True,
        chunk_pages: int | None = None,
    ) -> None:
        self.classes = PageClasses()
        self.pool = PagePool(allocator, reserve_slabs, compacts)
        self.held: dict[Request, RequestPages] = {}
        self.sharing = Sharing(self.pool, self.classes, self.held, prefix_cache, chunk_pages)
        self.host = HostMemory(self.pool, host_bytes)
        self.num_narrowed_pages = 0
        for page_class in classes.values():
            self.register(page_class)

    def start_over(self) -> None:
        """Forget all pages: nobody holds any, none is cached or saved, and nothing is left for the device to do.

        For when an operation was cut short and the books cannot be trusted: only what no operation changes is read.
        """
        pool = self.pool.emptied()
        self.held = {}
        self.sharing = Sharing(pool, self.classes, self.held, self.sharing.prefix_cache, self.sharing.chunk_pages)
        self.host = HostMemory(pool, self.host.max_bytes, self.host.num_saved)
        self.pool = pool

    def forget_cached(self) -> None:
        """Evict all pages that nobody holds, as what they hold counts no more."""
        self.pool.evict_all()

    # -- classes of pages ----------------------------------------------------------------------------------

    def register(self, page_class: PageClass) -> None:
        """Serve requests of a further model and format."""
        self.pool.allocator.register(page_class)
        self.classes[page_class.model, page_class.precision] = page_class

    def unregister(self, model: str) -> None:
        """Serve requests of a model no longer, of whose pages none may be held; those that are cached are evicted.

        What is queued for the device must have been done if it concerns the model.

        Raises:
            PageError: a request holds pages of it; then all its classes are still known.
        """
        self.pool.evict_all(model)
        self.pool.allocator.unregister(model)
        for known in [key for key in self.classes if key[0] == model]:
            del self.classes[known]

    def class_of(self, model: str, kv_format: str) -> PageClass:
        """Page class of a model and KV format. Raises ConfigError for a pair that the cache was not set up for."""
        return self.classes[model, kv_format]

    def page_units(self, page_class: PageClass) -> int:
        """Units that a page of the class takes."""
        return self.pool.allocator.page_units(page_class)

    def share_names(self, page_class: PageClass) -> frozenset[str]:
        """Memory shares that the pages of a request in the class, its residual page included, count against."""
        return self.pool.allocator.share_names(page_class)

    # -- growing and shrinking -----------------------------------------------------------------------------

    @property
    def requests(self) -> KeysView[Request]:
        """The requests that hold pages."""
        return self.held.keys()

    def holds(self, request: Request) -> RequestPages:
        """What the request holds, to read only; empty for one that holds nothing."""
        held = self.held.get(request)
        return no_pages(self.class_of(request.model, request.kv_precision)) if held is None else held

    def demand(self, request: Request, num_tokens: int) -> dict[PageClass, int]:
        """Pages the request still lacks, by class, so that its first `num_tokens` tokens have a home, or in layers with
        a window those that the next step computes; for one that holds nothing, as if it shared nothing."""
        held = self.held.get(request)
        demand: dict[PageClass, int] = {}
        if held is None:
            for page_class in self.class_of(request.model, request.kv_precision).groups if num_tokens > 0 else ():
                demand |= page_class.with_residual(page_class.end_page(num_tokens, 0))
            return demand
        for group in held.groups:
            lacking = group.page_class.end_page(num_tokens, request.num_computed_tokens) - group.num_pages
            if lacking > 0:
                demand[group.page_class] = lacking
        return demand

    def grow(self, request: Request, num_tokens: int, leaving: Demand | None = None) -> bool:
        """Give the request all pages of `demand`, or none. Pages behind a window go back to the pool.

        A request that holds nothing may find some of them: saved in host memory, held by the sample it is forked
        from, or in the prefix cache. Its `num_computed_tokens` is set to what these hold.

        Args:
            leaving: pages that must be left for others; besides, `reserve_slabs` are. None: nothing need be left.
        """
        held = self.held.get(request)
        if held is None:
            return self._start(request, num_tokens, leaving)
        self._drop_behind_windows(request, held)
        demand = self.demand(request, num_tokens)
        if not demand:
            return True
        pages = self.pool.take(demand, leaving)
        if pages is None:
            return False
        for group in held.groups:
            if group.page_class in demand:
                group.append(group.page_class, pages[group.page_class])
        return True

    def _drop_behind_windows(self, request: Request, held: RequestPages) -> None:
        """Give back the pages that nothing the request has still to compute attends to."""
        for group in held.groups:
            if group.page_class.window is not None:
                self.pool.decref(group.drop(group.page_class.first_page(request.num_computed_tokens)))

    def _start(self, request: Request, num_tokens: int, leaving: Demand | None) -> bool:
        page_class = self.class_of(request.model, request.kv_precision)
        if request in self.host.saved:
            held = self.host.load(request, num_tokens, leaving)
        elif num_tokens > 0:
            origin_pages = None if request.fork_of is None else self.held.get(request.fork_of)
            held = self.sharing.start(request, page_class, origin_pages, num_tokens, leaving)
        else:
            return True
        if held is not None:
            self.held[request] = held
        return held is not None

    def grow_together(self, requests: Sequence[Request]) -> bool:
        """Give each of some requests that hold pages all those that its known tokens need, or none of them any; see
        `grow`."""
        for request in requests:
            self._drop_behind_windows(request, self.held[request])
        lacking = [(self.held[request], self.demand(request, request.num_tokens)) for request in requests]
        joint: Counter[PageClass] = Counter()
        for _, demand in lacking:
            for page_class, count in demand.items():
                joint[page_class] += count
        pages = self.pool.take(joint) if joint else {}
        if pages is None:
            return False
        for held, demand in lacking:
            for group in held.groups:
                if count := demand.get(group.page_class, 0):
                    group.append(group.page_class, pages[group.page_class][-count:])
                    del pages[group.page_class][-count:]
        return True

    def release(self, request: Request) -> None:
        """Take back all that the request holds; nothing to do for one that holds nothing."""
        self.host.forget(request)
        if request in self.held:
            self._take_back(request)

    def _take_back(self, request: Request) -> None:
        held = self.held.pop(request)
        self.sharing.stop_writing(request, held)
        for group in held.groups:
            handles = array("i")
            for run in group.runs:
                handles.extend(run.handles)
            self.pool.decref(handles[::-1])  # so that a prefix is evicted from its end on
            if group.residual is not None:
                self.pool.decref([group.residual])

    # -- computed, saved, narrowed -------------------------------------------------------------------------

    def can_advance(self, request: Request) -> bool:
        """Whether the request has something to compute now: not while another computes the page it needs next.

        Moves its `num_computed_tokens` past what others have computed meanwhile.
        """
        held = self.held[request]
        return not held.waits or self.sharing.can_advance(request, held)

    def note_computed(self, request: Request) -> None:
        """The request's first `num_computed_tokens` tokens are in its pages: its full ones are ready to be shared."""
        self.sharing.note_computed(request, self.held[request])

    def can_save(self, request: Request) -> bool:
        """Whether the request's pages may be saved: they are computed, in one format, and host memory has room."""
        held = self.held[request]
        # Pages in several formats take slabs of several: alone they might not fit where those of one format do.
        return not held.waits and held.exact and self.host.has_room(request, held)

    def save_bytes(self, request: Request) -> int:
        """Bytes that saving the request takes."""
        return self.host.num_bytes(request, self.held[request])

    def save(self, request: Request) -> None:
        """Queue the copy of a request's pages to host memory, and take them back; only what `can_save` allows."""
        self._drop_behind_windows(request, self.held[request])
        self.host.save(request, self.held[request])
        self._take_back(request)

    def ladder(self, model: str, kv_format: str, floor_format: str | None) -> list[PageClass]:
        """Classes that pages of a request in `kv_format` may be in, widest first, down to the floor."""
        return narrowing.ladder(self.classes, model, kv_format, floor_format)

    def next_requantization(self, request: Request, most: int, keep_pages: int) -> Requantization | None:
        """Up to `most` pages to narrow next, none of the newest `keep_pages`; None if nothing is left to narrow."""
        if request.min_kv_precision is None:
            return None
        steps = self.ladder(request.model, request.kv_precision, request.min_kv_precision)
        return narrowing.next_requantization(self.pool, request, self.held[request], steps, most, keep_pages)

    def most_narrowed_units(self, request: Request, keep_pages: int) -> int:
        """Units that narrowing a request as far as it allows would free, those of pages that others share too."""
        if request.min_kv_precision is None:
            return 0
        held, floor = self.holds(request), self.class_of(request.model, request.min_kv_precision)
        stop = request.num_computed_tokens // held.page_class.page_size - keep_pages
        return narrowing.most_freed_units(held, floor, stop)

    def requantize_pages(self, request: Request, what: Requantization) -> int:
        """Requantize pages as `next_requantization` said; how many, perhaps fewer than `what.count`, or 0."""
        count = narrowing.requantize_pages(self.pool, self.held[request], what)
        self.num_narrowed_pages += count
        return count

    # -- the memory as a whole -----------------------------------------------------------------------------

    @property
    def reserve_slabs(self) -> int:
        """Free slabs that are kept at hand."""
        return self.pool.reserve_slabs

    @property
    def num_free_slabs(self) -> int:
        """Slabs that no page lies in."""
        return len(self.pool.allocator.free_slabs)

    @property
    def is_compacting(self) -> bool:
        """Whether more pages would have been moved together in this step than may be moved in one."""
        return self.pool.compaction.is_cut_short

    @property
    def host_bytes(self) -> int:
        """Most bytes of preempted requests' pages that are kept in host memory."""
        return self.host.max_bytes

    def begin_step(self) -> None:
        """To be called once before each step, see `PagePool.begin_step`."""
        self.pool.begin_step()

    def take_operations(self) -> list[PageOperation]:
        """What the device has to do, in this order, before it computes the next step."""
        return self.pool.take_operations()

    def make_room(self, wanted: Demand, spare_slabs: int = 0, *, patient: bool = False) -> bool:
        """Whether that many pages can be had now, see `PagePool.make_room`."""
        return self.pool.make_room(wanted, spare_slabs, patient=patient)

    def lacking_units(self, wanted: Demand, spare_slabs: int = 0) -> int:
        """Units that are wanted beyond those free or in evictable pages; 0 or less: none."""
        return self.pool.lacking_units(wanted, spare_slabs)

    def can_allocate(self, demand: Demand) -> bool:
        """Whether so many pages are free, without evicting or moving any."""
        return self.pool.allocator.can_allocate(demand)

    def fits_alone(self, model: str, kv_format: str, num_tokens: int) -> bool:
        """Whether an otherwise empty arena could hold a request of that many tokens, quotas respected."""
        return self.pool.allocator.fits_empty(self.class_of(model, kv_format).demand(num_tokens))

    def max_tokens_alone(self, model: str, kv_format: str) -> int:
        """Most tokens that a request could have in an otherwise empty arena; 0 if none fits."""
        return self.pool.max_tokens(self.class_of(model, kv_format))

    # -- where tokens are ----------------------------------------------------------------------------------

    def segments(self, request: Request, num_cached: int, group: int = 0) -> list[Segment]:
        """Where the first `num_cached` tokens of a request are for a layer group, in the order of positions; no empty
        segments, and none of what was dropped behind a window.

        Raises:
            PageError: more tokens than the request has pages for.
        """
        pages = self.holds(request).groups[group]
        own, residual = pages.page_class, pages.residual
        lacking = own.with_residual(own.num_pages(num_cached) - pages.num_pages) if num_cached > 0 else {}
        if residual is not None and own.residual is not None:
            lacking.pop(own.residual, None)
        if lacking:
            short = ", ".join(f"{count} of {page_class}" for page_class, count in lacking.items())
            raise PageError(f"request {request.request_id}: {num_cached} tokens need {short} more; grow it first")
        return pages.segments(num_cached, self.pool.table.units_of)

    def first_units(self, request: Request, first: int, count: int, group: int = 0) -> list[int]:
        """First units of `count` of the request's pages in a layer group, from the page `first` on, the residual page
        aside."""
        parts = self.holds(request).groups[group].parts(first, first + count)
        return [unit for run in parts for unit in self.pool.table.units_of(run.handles)]

    def page_unit(self, request: Request, page: int, group: int = 0) -> int:
        """First unit of one of the request's pages in a layer group, the residual page aside."""
        return self.pool.table.units[self.held[request].groups[group].page(page)[1]]

    def residual_unit(self, request: Request, group: int = 0) -> int | None:
        """First unit of the request's residual page in a layer group, if it has one."""
        residual = self.holds(request).groups[group].residual
        return None if residual is None else self.pool.table.units[residual]

    def tokens_by_format(self, request: Request) -> dict[str, int]:
        """How many of the request's computed tokens are kept in each KV precision, oldest first; where layer groups
        that keep them all differ, in the one that takes least."""
        if request not in self.held:
            return {}
        groups = enumerate(self.held[request].page_class.groups)
        known = [number for number, own in groups if own.window is None] or [0]
        segments = [self.segments(request, request.num_computed_tokens, number) for number in known]
        starts = sorted({segment.first_position for own in segments for segment in own})
        tokens: Counter[str] = Counter()
        for first, stop in itertools.pairwise([*starts, request.num_computed_tokens]):
            there = [
                segment
                for own in segments
                for segment in own
                if 0 <= first - segment.first_position < segment.num_tokens
            ]
            names = [segment.precision or segment.kv_format for segment in there]
            tokens[min(names, key=lambda name: self.class_of(request.model, name).bytes_of_groups)] += stop - first
        return dict(tokens)
