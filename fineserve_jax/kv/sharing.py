"""How requests come to share pages, and who computes them.

A new request starts with the longest prefix of its tokens whose blocks are cached in its class; a further sample of a
prompt starts as a *fork* of the first. What is not cached yet the request caches as its own to compute. A cached block
is in one of three states:

    ready                   holds its keys and values; whoever needs it reads it
    not ready, a writer     that request computes it; others that share it wait
    not ready, no writer    the writer is gone; the first of the others that gets to it becomes the writer

Nobody ever writes to a page that is ready: a request shares full pages only, and at most those before its last token.
"""

from array import array

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass, PageClasses
from fineserve_jax.kv.page_pool import Demand, PagePool
from fineserve_jax.kv.prefix_cache import CachedBlock, hash_blocks
from fineserve_jax.kv.request_pages import RequestPages
from fineserve_jax.request import Request

PREFIX_CACHES = ("exact", "convert", "off")


class Sharing:
    """Starts requests on what others have computed.

    Args:
        pool: where pages are.
        classes: page class of each model and KV format; the manager's, read only here.
        prefix_cache: "exact" shares full pages between requests that begin alike, in one format; "convert" also
            serves a request from a prefix in a wider format, requantizing it, so that its tokens depend on what
            was cached; "off" shares nothing but what a sample finds computed of another one of its prompt.

    Raises:
        ConfigError: another `prefix_cache`.
    """

    def __init__(self, pool: PagePool, classes: PageClasses, prefix_cache: str) -> None:
        if prefix_cache not in PREFIX_CACHES:
            raise ConfigError(f"prefix_cache={prefix_cache!r}: choose one of {', '.join(PREFIX_CACHES)}")
        self._pool, self._classes = pool, classes
        self._cache = pool.prefix_cache
        self.prefix_cache = prefix_cache

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
        demand = page_class.demand(num_tokens)
        found = self._find(request, page_class, num_tokens)
        own = [block.page_class is page_class for block in found]
        pages = self._take_beside(found, demand, page_class, leaving)
        if pages is None and not all(own):  # the wider pages take room, too: start without them
            found = found[: own.index(False)]
            pages = self._take_beside(found, demand, page_class, leaving)
        if pages is None:
            return None
        held = RequestPages(page_class, block_hash=request.prefix_root)
        if page_class.residual is not None:
            (held.residual,) = pages[page_class.residual]
        new = iter(pages.get(page_class, ()))
        places = [block.handle if block.page_class is page_class else next(new) for block in found]
        held.append(page_class, array("i", [*places, *new]))
        self._enter(request, held, num_tokens, found)
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
        if origin is None or origin_pages is None:
            return None
        if not _can_fork(request, page_class, origin, origin_pages, num_tokens):
            return None
        full, begun = divmod(known, page_class.page_size)
        shared = array("i", (handle for run in origin_pages.parts(0, full) for handle in run.handles))
        demand = page_class.demand(num_tokens)
        demand[page_class] = demand.get(page_class, 0) - full
        self._pool.incref(shared)
        pages = self._pool.take({c: count for c, count in demand.items() if count}, leaving)
        if pages is None:
            self._pool.decref(shared[::-1])
            return None
        own = RequestPages(page_class, num_ready=full, block_hash=request.prefix_root)
        own.append(page_class, shared)
        own.append(page_class, pages.get(page_class, array("i")))
        if page_class.residual is not None:
            (own.residual,) = pages[page_class.residual]
        if begun and page_class.residual is not None:
            assert origin_pages.residual is not None, "a request in a format with a residual page has one"
            assert own.residual is not None, "it was taken above"
            self._pool.copy(origin_pages.residual, own.residual, page_class.residual, page_class.residual)
        elif begun:
            self._pool.copy(origin_pages.page(full)[1], own.page(full)[1], page_class, page_class)
        if self._caches(request, own):
            own.num_cached_blocks = full
            for own.block_hash, _ in hash_blocks(request.token_ids, page_class.page_size, request.prefix_root, 0, full):
                pass
        request.num_computed_tokens = known
        return own

    def _take_beside(
        self, found: list[CachedBlock], demand: Demand, page_class: PageClass, leaving: Demand | None
    ) -> "dict[PageClass, array[int]] | None":
        """Hold what was found, so that none of it is evicted to make room, and take what is still wanted of `demand`;
        None, and nothing is held, if that cannot be had."""
        handles = [block.handle for block in found]
        self._pool.incref(handles)
        shared = sum(block.page_class is page_class for block in found)
        wanted = {c: count - (shared if c is page_class else 0) for c, count in demand.items()}
        pages = self._pool.take(wanted, leaving)
        if pages is None:
            self._pool.decref(handles[::-1])
        return pages

    def _find(self, request: Request, page_class: PageClass, num_tokens: int) -> list[CachedBlock]:
        """Cached blocks of the request's first tokens, in order: of its class, or in "convert" of a wider one."""
        if self.prefix_cache == "off" or not request.shares_prefix:
            return []
        found: list[CachedBlock] = []
        size = page_class.page_size
        # The last token is computed in any case, since what follows it is to be sampled.
        known = (min(num_tokens, request.num_tokens) - 1) // size
        for block_hash, tokens in hash_blocks(request.token_ids, size, request.prefix_root, 0, known):
            block = self._cache.find(page_class, block_hash, tokens)
            if block is None and self.prefix_cache == "convert":
                block = self._find_wider(page_class, block_hash, tokens)
            # Whoever takes over a page that is not ready computes what follows, too: nothing ready may be among it.
            if block is None or (block.ready and found and not found[-1].ready):
                break
            found.append(block)
        return found

    def _find_wider(self, page_class: PageClass, block_hash: bytes, tokens: bytes) -> CachedBlock | None:
        for other in self._classes.values():
            if other.model == page_class.model and other.page_bytes > page_class.page_bytes:
                block = self._cache.find(other, block_hash, tokens)
                if block is not None and block.ready:
                    return block
        return None

    def _enter(self, request: Request, held: RequestPages, num_tokens: int, found: list[CachedBlock]) -> None:
        """Convert what was found in other classes, note what is computed, and cache a new request's full pages."""
        size, page_class = held.page_class.page_size, held.page_class
        for index, block in enumerate(found):
            held.block_hash = block.block_hash
            if block.page_class is not page_class:
                handle = held.page(index)[1]
                self._pool.copy(block.handle, handle, block.page_class, page_class)
                self._cache.add(CachedBlock(page_class, block.block_hash, block.tokens, handle, ready=True))
                self._pool.decref([block.handle])
                self._cache.stats.converted_pages += 1
                held.exact = False
        held.num_cached_blocks = len(found)
        held.num_ready = next((i for i, block in enumerate(found) if not block.ready), len(found))
        held.waits = held.num_ready < len(found)
        request.num_computed_tokens = held.num_ready * size
        self._cache.stats.asked_tokens += num_tokens
        self._cache.stats.hit_tokens += size * len(found)
        if self._caches(request, held):
            # Not the page of the last token, which this request writes in any case, perhaps after another has.
            stop = min((min(num_tokens, request.num_tokens) - 1) // size, held.num_pages)
            self._cache_blocks(request, held, stop, ready=False)

    # -- it goes on, and ends --------------------------------------------------------------------------------

    def can_advance(self, request: Request, held: RequestPages) -> bool:
        """Whether a request that waits has something to compute now, see `KVManager.can_advance`."""
        size = held.page_class.page_size
        index, most = request.num_computed_tokens // size, (request.num_tokens - 1) // size
        handles = [handle for run in held.parts(0, held.num_cached_blocks) for handle in run.handles]
        blocks = [self._cache.by_handle.get(handle) for handle in handles]
        while index < min(most, len(blocks)) and (block := blocks[index]) is not None and block.ready:
            index += 1
        request.num_computed_tokens, held.num_ready = index * size, index
        block = blocks[index] if index < len(blocks) else None
        if block is not None and not block.ready and block.writer not in (None, request):
            return False
        for block in blocks[index:]:
            if block is not None and not block.ready:
                block.writer = request  # whoever was to compute it is gone, or waits for this one
        held.waits = False
        return True

    def note_computed(self, request: Request, held: RequestPages) -> None:
        """The request's first `num_computed_tokens` tokens are in its pages: its full ones are ready to be shared."""
        full = request.num_computed_tokens // held.page_class.page_size
        if full <= held.num_ready:
            return
        for run in held.parts(held.num_ready, min(full, held.num_cached_blocks)):
            for handle in run.handles:
                if (block := self._cache.by_handle.get(handle)) is not None:
                    block.writer, block.ready = None, True
        if self._caches(request, held) and full > held.num_cached_blocks:
            self._cache_blocks(request, held, full, ready=True)
        held.num_ready = full

    def stop_writing(self, request: Request, held: RequestPages) -> None:
        """The request will not compute what it has not: those that wait for it take that over."""
        for run in held.parts(held.num_ready, held.num_cached_blocks):
            for handle in run.handles:
                block = self._cache.by_handle.get(handle)
                if block is not None and block.writer is request:
                    block.writer = None

    def _caches(self, request: Request, held: RequestPages) -> bool:
        """Whether others may share what the request computes."""
        return request.shares_prefix and (
            self.prefix_cache == "convert" or (self.prefix_cache == "exact" and held.exact)
        )

    def _cache_blocks(self, request: Request, held: RequestPages, stop: int, ready: bool) -> None:
        """Cache the request's pages up to the page `stop`, as computed or to be computed by it."""
        size, writer = held.page_class.page_size, None if ready else request
        blocks = hash_blocks(request.token_ids, size, held.block_hash, held.num_cached_blocks, stop)
        for run in held.parts(held.num_cached_blocks, stop):
            for handle, (block_hash, tokens) in zip(run.handles, blocks, strict=False):
                self._cache.add(CachedBlock(run.page_class, block_hash, tokens, handle, writer, ready))
                held.block_hash = block_hash
        held.num_cached_blocks = max(held.num_cached_blocks, stop)


def _can_fork(request: Request, page_class: PageClass, origin: Request, pages: RequestPages, num_tokens: int) -> bool:
    """Whether the origin still has all but the last of `num_tokens` tokens, as they were computed."""
    if pages.page_class is not page_class or not pages.exact or origin.is_long != request.is_long:
        return False
    known, size = num_tokens - 1, page_class.page_size
    full, begun = divmod(known, size)
    residual_is_gone = begun and page_class.residual is not None and origin.num_computed_tokens // size > full
    return num_tokens == request.num_prompt_tokens and origin.num_computed_tokens >= known and not residual_is_gone
