"""How requests come to share pages, and who computes them.

A new request starts with the longest prefix of its tokens whose blocks are cached in its class; a further sample of a
prompt starts as a *fork* of the first. What is not cached yet the request caches as its own to compute. A cached block
is in one of three states:

    ready                   holds its keys and values; whoever needs it reads it
    not ready, a writer     that request computes it; others that share it wait
    not ready, no writer    the writer is gone; the first of the others that gets to it becomes the writer

Nobody ever writes to a page that is ready: a request shares full pages only, and at most those before its last token.

Where layers form groups, each group's page of a block is cached by itself, in its own class. A prefix can be shared if
all that tokens behind it attend to is cached: of a group with a window the blocks inside that.

    block            0   1   2   3   4   5 | the hit ends here
    full attention   x   x   x   x   x   x |
    a window                     x   x   x |     what lies behind it need not be there
"""

import itertools
from array import array
from collections.abc import Mapping

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass, PageClasses
from fineserve_jax.kv.page_pool import Demand, PagePool
from fineserve_jax.kv.prefix_cache import CachedBlock, hash_blocks
from fineserve_jax.kv.request_pages import GroupPages, RequestPages
from fineserve_jax.kv.shared_prefix import Prefix, Row, is_to_come, num_ready_blocks
from fineserve_jax.request.request import Request

PREFIX_CACHES = ("exact", "convert", "off")


class Sharing:
    """Starts requests on what others have computed.

    Args:
        pool: where pages are.
        classes: page class of each model and KV format; the manager's, read only here.
        held: what requests hold; the manager's, read only here.
        prefix_cache: "exact" shares full pages between requests that begin alike, in one format; "convert" also
            serves a request from a prefix in a wider format, requantizing it, so that its tokens depend on what
            was cached; "off" shares nothing but what a sample finds computed of another one of its prompt.
        chunk_pages: share only what was computed as each would compute it: whole chunks of prompts, of so many pages.
            None: any full pages.

    Raises:
        ConfigError: another `prefix_cache`.
    """

    def __init__(
        self,
        pool: PagePool,
        classes: PageClasses,
        held: Mapping[Request, RequestPages],
        prefix_cache: str,
        chunk_pages: int | None = None,
    ) -> None:
        if prefix_cache not in PREFIX_CACHES:
            raise ConfigError(f"prefix_cache={prefix_cache!r}: choose one of {', '.join(PREFIX_CACHES)}")
        self._pool, self._classes, self._held = pool, classes, held
        self._cache = pool.prefix_cache
        self.prefix_cache, self.chunk_pages = prefix_cache, chunk_pages

    # -- a request starts ------------------------------------------------------------------------------------

    def start(
        self,
        request: Request,
        page_class: PageClass,
        origin_pages: RequestPages | None,
        num_tokens: int,
        leaving: Demand | None,
    ) -> RequestPages | None:
        """Pages for the first `num_tokens` tokens, at least 1, of a request that holds nothing, as many as can be
        shared ones; None if they cannot be had.

        Args:
            page_class: the request's.
            origin_pages: what the sample it is forked from holds; None: nothing, or it is no fork.
            leaving: see `PagePool.take`.
        """
        forked = self._fork(request, page_class, origin_pages, num_tokens, leaving)
        return forked or self._start_on_prefix(request, page_class, num_tokens, leaving)

    def _start_on_prefix(
        self, request: Request, page_class: PageClass, num_tokens: int, leaving: Demand | None
    ) -> RequestPages | None:
        """Pages of a request that starts with what is cached of its prefix; None if they cannot be had."""
        rows = self._find(request, page_class, num_tokens)
        prefix = self._longest(request, rows, page_class)
        pages = self._take_beside(prefix, num_tokens, leaving)
        if pages is None and prefix.num_own < len(prefix.rows):  # the wider pages take room, too: start without them
            prefix = self._longest(request, rows[: prefix.num_own], page_class)
            pages = self._take_beside(prefix, num_tokens, leaving)
        if pages is None:
            return None
        groups = []
        for number, own in enumerate(page_class.groups):
            group = GroupPages(own, num_dropped=prefix.first_page(own))
            if own.residual is not None:
                group.residual = pages[own.residual].pop()
            new = iter(pages.get(own, ()))
            blocks = prefix.blocks(number)
            places = [block.handle if block.page_class is own else next(new) for block in blocks]
            group.append(own, array("i", [*places, *new]))
            groups.append(group)
        held = RequestPages(groups, block_hash=request.prefix_root)
        self._enter(request, held, num_tokens, prefix)
        return held

    def _fork(
        self,
        request: Request,
        page_class: PageClass,
        origin_pages: RequestPages | None,
        num_tokens: int,
        leaving: Demand | None,
    ) -> RequestPages | None:
        """Pages of a request that starts as a copy of another sample of the same prompt, all of it computed but the
        last token; None if that cannot be.

        Full pages are shared. The page that both would write to next is copied.
        """
        origin, known = request.fork_of, num_tokens - 1
        if origin is None or origin_pages is None or self.chunk_pages is not None:
            return None
        if not _can_fork(request, page_class, origin, origin_pages, num_tokens):
            return None
        full, begun = divmod(known, page_class.page_size)
        shared = [g.handles(g.page_class.first_page(known), full) for g in origin_pages.groups]
        demand: dict[PageClass, int] = {}
        for own in page_class.groups:
            demand |= own.with_residual(own.num_pages(num_tokens) - full)
        for handles in shared:
            self._pool.incref(handles)
        pages = self._pool.take(demand, leaving)
        if pages is None:
            for handles in shared:
                self._pool.decref(handles[::-1])
            return None
        groups = []
        for theirs, handles in zip(origin_pages.groups, shared, strict=True):
            group = GroupPages(theirs.page_class, num_dropped=theirs.page_class.first_page(known))
            group.append(group.page_class, handles)
            group.append(group.page_class, pages.get(group.page_class, array("i")))
            if group.page_class.residual is not None:
                (group.residual,) = pages[group.page_class.residual]
            if begun:
                self._copy_begun(theirs, group, full)
            groups.append(group)
        held = RequestPages(groups, num_ready=full, block_hash=request.prefix_root)
        if self._caches(request, held):
            held.num_cached_blocks = full
            size, root = page_class.page_size, request.prefix_root
            for held.block_hash, _ in hash_blocks(request.token_ids, size, root, 0, full):
                pass
        request.num_computed_tokens = known
        return held

    def _copy_begun(self, theirs: GroupPages, ours: GroupPages, page: int) -> None:
        """Copy the page that is not full yet, or the residual page in its place."""
        own = ours.page_class
        if own.residual is None:
            self._pool.copy(theirs.page(page)[1], ours.page(page)[1], own, own)
            return
        assert theirs.residual is not None, "a request in a format with a residual page has one"
        assert ours.residual is not None, "it was taken with the others"
        self._pool.copy(theirs.residual, ours.residual, own.residual, own.residual)

    def _take_beside(
        self, prefix: Prefix, num_tokens: int, leaving: Demand | None
    ) -> "dict[PageClass, array[int]] | None":
        """Hold what was found, so that none of it is evicted to make room, and take the other pages that the first
        `num_tokens` tokens need; None, and nothing is held, if these cannot be had."""
        handles: list[int] = []
        demand: dict[PageClass, int] = {}
        for number, own in enumerate(prefix.page_class.groups):
            blocks = prefix.blocks(number)
            handles += [block.handle for block in blocks]
            # What others compute for it may come at once: it then goes on behind all of that.
            stop = max(own.end_page(num_tokens, prefix.num_tokens), len(prefix.rows))
            shared = sum(block.page_class is own for block in blocks)
            demand |= own.with_residual(stop - prefix.first_page(own) - shared)
        self._pool.incref(handles)
        pages = self._pool.take(demand, leaving)
        if pages is None:
            self._pool.decref(handles[::-1])
        return pages

    def _find(self, request: Request, page_class: PageClass, num_tokens: int) -> list[Row]:
        """What is cached of the request's first tokens, block by block: of each layer group in its class, or in
        "convert" in a wider one. It ends with the last block that all groups without a window have."""
        if self.prefix_cache == "off" or not request.shares_prefix:
            return []
        rows: list[Row] = []
        size = page_class.page_size
        known = self._shareable(request, min(num_tokens - 1, request.num_shareable_tokens) // size)
        for block_hash, tokens in hash_blocks(request.token_ids, size, request.prefix_root, 0, known):
            row = tuple(self._find_block(page_class, own, block_hash, tokens) for own in page_class.groups)
            if any(block is None and own.window is None for own, block in zip(page_class.groups, row, strict=True)):
                break
            rows.append(row)
        return rows

    def _longest(self, request: Request, rows: list[Row], page_class: PageClass) -> Prefix:
        """As much of the rows as can be shared: what is ready as far as it goes, and then blocks that are yet to be
        computed, one after the other. Whoever takes over one of these computes what follows, too: nothing ready may be
        among it, and nothing that another computes without waiting for it."""
        num_ready = stop = num_ready_blocks(rows, page_class)
        while stop < len(rows) and is_to_come(rows[stop]) and (stop == num_ready or self._follows(rows, stop)):
            stop += 1
        if (shareable := self._shareable(request, stop)) < stop:
            return self._longest(request, rows[:shareable], page_class)
        return Prefix(page_class, rows[:stop], num_ready)

    def _follows(self, rows: list[Row], index: int) -> bool:
        """Whether a block is computed after the one ahead of it: by the same request, by one that waits for that, or by
        whoever needs it next."""
        writers = [block.writer for row in rows[index - 1 : index + 1] for block in row[:1] if block is not None]
        held = None if writers[1] is None else self._held.get(writers[1])
        if held is None or writers[0] is writers[1]:
            return True
        pages = zip(held.groups, rows[index - 1], strict=True)
        return all(list(group.handles(index - 1, index)) == [block and block.handle] for group, block in pages)

    def _find_block(
        self, page_class: PageClass, own: PageClass, block_hash: bytes, tokens: bytes
    ) -> CachedBlock | None:
        """`page_class`: the request's; `own`: that of the layer group."""
        block = self._cache.find(own, block_hash, tokens)
        if block is None and self.prefix_cache == "convert":
            block = self._find_wider(page_class, own, block_hash, tokens)
        return block

    def _find_wider(
        self, page_class: PageClass, own: PageClass, block_hash: bytes, tokens: bytes
    ) -> CachedBlock | None:
        """A block in a precision that no layer has narrower: each layer saw what those below it keep."""
        for others in self._classes.values():
            if others.model != own.model or others is page_class or not others.holds_at_least(page_class):
                continue
            other = others.groups[own.group]
            if other.page_bytes > own.page_bytes or other.kv_format == own.kv_format:
                block = self._cache.find(other, block_hash, tokens)
                if block is not None and block.ready:
                    return block
        return None

    def _enter(self, request: Request, held: RequestPages, num_tokens: int, prefix: Prefix) -> None:
        """Convert what was found in other classes, note what is computed, and cache a new request's full pages."""
        size = held.page_class.page_size
        for number, group in enumerate(held.groups):
            for index, block in enumerate(prefix.blocks(number), group.num_dropped):
                held.block_hash = block.block_hash
                if block.page_class is not group.page_class:
                    self._convert(block, group.page_class, group.page(index)[1])
                    held.exact = False
        held.num_cached_blocks, held.num_ready = len(prefix.rows), prefix.num_ready
        held.waits = held.num_ready < held.num_cached_blocks
        request.num_computed_tokens = held.num_ready * size
        self._cache.stats.asked_tokens += num_tokens
        self._cache.stats.hit_tokens += size * held.num_cached_blocks
        if self._caches(request, held):
            # Not the page of the last token, which this request writes in any case, perhaps after another has.
            stop = min((min(num_tokens, request.num_tokens) - 1) // size, held.num_pages)
            stop = self._shareable(request, stop)
            self._cache_blocks(request, held, stop, ready=False)

    def _convert(self, block: CachedBlock, page_class: PageClass, handle: int) -> None:
        """Requantize a cached block into a page of another class, which is cached, too."""
        self._pool.copy(block.handle, handle, block.page_class, page_class)
        self._cache.add(CachedBlock(page_class, block.block_hash, block.tokens, handle, ready=True))
        self._pool.decref([block.handle])
        self._cache.stats.converted_pages += 1

    # -- it goes on, and ends --------------------------------------------------------------------------------

    def can_advance(self, request: Request, held: RequestPages) -> bool:
        """Whether a request that waits has something to compute now, see `KVManager.can_advance`."""
        size = held.page_class.page_size
        index, most = request.num_computed_tokens // size, (request.num_tokens - 1) // size
        handles = zip(*(group.handles(index, held.num_cached_blocks) for group in held.groups), strict=True)
        rows = [[self._cache.by_handle.get(handle) for handle in row] for row in handles]
        done = 0
        while done < min(most - index, len(rows)) and all(block is not None and block.ready for block in rows[done]):
            done += 1
        index += done
        request.num_computed_tokens, held.num_ready = index * size, index
        to_come = [[block for block in row if block is not None and not block.ready] for row in rows[done:]]
        if to_come and any(block.writer not in (None, request) for block in to_come[0]):
            return False
        for block in itertools.chain.from_iterable(to_come):
            block.writer = request  # whoever was to compute it is gone, or waits for this one
        held.waits = False
        return True

    def note_computed(self, request: Request, held: RequestPages) -> None:
        """The request's first `num_computed_tokens` tokens are in its pages: its full ones are ready to be shared."""
        full = request.num_computed_tokens // held.page_class.page_size
        if full <= held.num_ready:
            return
        for group in held.groups:
            for handle in group.handles(held.num_ready, min(full, held.num_cached_blocks)):
                if (block := self._cache.by_handle.get(handle)) is not None:
                    block.writer, block.ready = None, True
        stop = self._shareable(request, full)
        if self._caches(request, held) and stop > held.num_cached_blocks:
            self._cache_blocks(request, held, stop, ready=True)
        held.num_ready = full

    def stop_writing(self, request: Request, held: RequestPages) -> None:
        """The request will not compute what it has not: those that wait for it take that over."""
        for group in held.groups:
            for handle in group.handles(held.num_ready, held.num_cached_blocks):
                block = self._cache.by_handle.get(handle)
                if block is not None and block.writer is request:
                    block.writer = None

    def _shareable(self, request: Request, num_pages: int) -> int:
        """How many of a request's first full pages may be shared."""
        if self.chunk_pages is None:
            return num_pages
        of_prompt = request.num_prompt_tokens // self._classes[request.model, request.kv_precision].page_size
        return min(num_pages, of_prompt) // self.chunk_pages * self.chunk_pages

    def _caches(self, request: Request, held: RequestPages) -> bool:
        """Whether others may share what the request computes."""
        return request.shares_prefix and (
            self.prefix_cache == "convert" or (self.prefix_cache == "exact" and held.exact)
        )

    def _cache_blocks(self, request: Request, held: RequestPages, stop: int, ready: bool) -> None:
        """Cache the request's pages up to the page `stop`, as computed or to be computed by it."""
        size, writer, first = held.page_class.page_size, None if ready else request, held.num_cached_blocks
        if stop <= first:
            return
        blocks = list(hash_blocks(request.token_ids, size, held.block_hash, first, stop))
        for group in held.groups:
            rest = iter(blocks[max(0, group.num_dropped - first) :])
            for run in group.parts(first, stop):
                for handle, (block_hash, tokens) in zip(run.handles, rest, strict=False):
                    self._cache.add(CachedBlock(run.page_class, block_hash, tokens, handle, writer, ready))
        held.num_cached_blocks, held.block_hash = stop, blocks[-1][0]


def _can_fork(request: Request, page_class: PageClass, origin: Request, pages: RequestPages, num_tokens: int) -> bool:
    """Whether the origin still has all but the last of `num_tokens` tokens, as they were computed."""
    if pages.page_class is not page_class or not pages.exact or origin.is_long != request.is_long:
        return False
    known, size = num_tokens - 1, page_class.page_size
    if any(group.num_dropped > group.page_class.first_page(known) for group in pages.groups):
        return False
    full, begun = divmod(known, size)
    has_residual = any(own.residual is not None for own in page_class.groups)
    residual_is_gone = begun and has_residual and origin.num_computed_tokens // size > full
    return num_tokens == request.num_prompt_tokens and origin.num_computed_tokens >= known and not residual_is_gone
