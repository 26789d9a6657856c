"""How requests come to share pages, and who computes them.

A new request starts with the longest prefix that is listed, in its class, in the prefix cache; a further sample of a
prompt starts as a *fork* of the first. What it cannot find it lists as its own to compute. A page on the list is in one
of three states:

    ready                   holds its keys and values; whoever needs it reads it
    not ready, a writer     that request computes it; others that share it wait
    not ready, no writer    the writer is gone; the first of the others that gets to it becomes the writer

Nobody ever writes to a page that is ready: a request shares full pages only, and at most those before its last token.
"""

from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.pages import RequestPages
from fineserve_jax.kv.prefix import ListedPage, prefix_pages
from fineserve_jax.request import Request

if TYPE_CHECKING:
    from fineserve_jax.kv.manager import KVManager

PREFIX_CACHES = ("exact", "convert", "off")


class Sharing:
    """Starts requests on what others have computed.

    Args:
        kv: whose pages.
        prefix_cache: "exact" shares full pages between requests that begin alike, in one format; "convert" also
            serves a request from a prefix in a wider format, encoding it anew, so that its tokens depend on what
            was cached; "off" shares nothing but what a sample finds computed of another one of its prompt.

    Raises:
        ConfigError: another `prefix_cache`.
    """

    def __init__(self, kv: "KVManager", prefix_cache: str) -> None:
        if prefix_cache not in PREFIX_CACHES:
            raise ConfigError(f"prefix_cache={prefix_cache!r}: choose one of {', '.join(PREFIX_CACHES)}")
        self._kv = kv
        self._list = kv.prefix
        self.prefix_cache = prefix_cache

    def start(self, request: Request, num_tokens: int, leaving: Mapping[PageClass, int] | None) -> bool:
        """Give a request that holds nothing pages for its first tokens, as many as can be shared ones."""
        page_class = self._kv.class_of(request.model, request.kv_precision)
        demand = page_class.demand(num_tokens)
        if not demand:
            return True
        found = self._find(request, page_class, num_tokens)
        own = [listed.page_class is page_class for listed in found]
        pages = self._take_beside(found, demand, page_class, leaving)
        if pages is None and not all(own):  # the wider pages take room, too: start without them
            found = found[: own.index(False)]
            pages = self._take_beside(found, demand, page_class, leaving)
        if pages is None:
            return False
        held = self._kv.held[request] = RequestPages(page_class)
        if page_class.residual is not None:
            (held.residual,) = pages[page_class.residual]
        new = iter(pages.get(page_class, ()))
        places = [listed.handle if listed.page_class is page_class else next(new) for listed in found]
        held.append(page_class, array("i", [*places, *new]))
        self._enter(request, held, num_tokens, found)
        return True

    def _take_beside(
        self,
        found: list[ListedPage],
        demand: Mapping[PageClass, int],
        page_class: PageClass,
        leaving: Mapping[PageClass, int] | None,
    ) -> "dict[PageClass, array[int]] | None":
        """Hold what was found, so that none of it is evicted to make room, and take what is still wanted of `demand`;
        None, and nothing is held, if that cannot be had."""
        handles = [listed.handle for listed in found]
        self._kv.share(handles)
        shared = sum(listed.page_class is page_class for listed in found)
        wanted = {c: count - (shared if c is page_class else 0) for c, count in demand.items()}
        pages = self._kv.take(wanted, leaving)
        if pages is None:
            self._kv.let_go(handles[::-1])
        return pages

    def fork(self, request: Request, num_tokens: int, leaving: Mapping[PageClass, int] | None) -> bool:
        """Start as a copy of another sample of the same prompt, all of it computed but the last token.

        Full pages are shared. The page that both would write to next is copied.
        """
        origin = request.fork_of
        held = None if origin is None else self._kv.held.get(origin)
        page_class, known = self._kv.class_of(request.model, request.kv_precision), num_tokens - 1
        if origin is None or held is None or held.page_class is not page_class or not held.exact:
            return False
        size = page_class.page_size
        full, begun = divmod(known, size)
        residual_is_gone = begun and page_class.residual is not None and origin.num_computed_tokens // size > full
        if num_tokens != request.num_prompt_tokens or origin.num_computed_tokens < known or residual_is_gone:
            return False
        shared = array("i", (handle for run in held.parts(0, full) for handle in run.handles))
        demand = page_class.demand(num_tokens)
        demand[page_class] = demand.get(page_class, 0) - full
        self._kv.share(shared)
        pages = self._kv.take({c: count for c, count in demand.items() if count}, leaving)
        if pages is None:
            self._kv.let_go(shared[::-1])
            return False
        own = self._kv.held[request] = RequestPages(page_class, num_ready=full)
        own.append(page_class, shared)
        own.append(page_class, pages.get(page_class, array("i")))
        if page_class.residual is not None:
            (own.residual,) = pages[page_class.residual]
        if begun and page_class.residual is not None:
            assert held.residual is not None, "a request in a format with a residual page has one"
            assert own.residual is not None, "it was taken above"
            self._kv.copy(held.residual, own.residual, page_class.residual, page_class.residual)
        elif begun:
            self._kv.copy(held.page(full)[1], own.page(full)[1], page_class, page_class)
        if self._lists(request, own):
            own.num_listed = full
            for own.digest, _ in prefix_pages(request.token_ids, size, b"", 0, full):
                pass
        request.num_computed_tokens = known
        return True

    def can_go_on(self, request: Request) -> bool:
        """Whether the request has something to compute now: not while another computes the page it needs next.

        Moves its `num_computed_tokens` past what others have computed meanwhile.
        """
        held = self._kv.held[request]
        if not held.waits:
            return True
        size = held.page_class.page_size
        index, most = request.num_computed_tokens // size, (request.num_tokens - 1) // size
        handles = [handle for run in held.parts(0, held.num_listed) for handle in run.handles]
        listed = [self._list.by_handle.get(handle) for handle in handles]
        while index < min(most, len(listed)) and (page := listed[index]) is not None and page.ready:
            index += 1
        request.num_computed_tokens, held.num_ready = index * size, index
        page = listed[index] if index < len(listed) else None
        if page is not None and not page.ready and page.writer not in (None, request):
            return False
        for page in listed[index:]:
            if page is not None and not page.ready:
                page.writer = request  # whoever was to compute it is gone, or waits for this one
        held.waits = False
        return True

    def note_computed(self, request: Request) -> None:
        """The request's first `num_computed_tokens` tokens are in its pages: its full ones are ready to be shared."""
        held = self._kv.held[request]
        size = held.page_class.page_size
        full = request.num_computed_tokens // size
        if full <= held.num_ready:
            return
        for run in held.parts(held.num_ready, min(full, held.num_listed)):
            for handle in run.handles:
                if (listed := self._list.by_handle.get(handle)) is not None:
                    listed.writer, listed.ready = None, True
        if self._lists(request, held) and full > held.num_listed:
            self._extend(request, held, full, ready=True)
        held.num_ready = full

    def _find(self, request: Request, page_class: PageClass, num_tokens: int) -> list[ListedPage]:
        """Listed pages for the request's first tokens, in order: of its class, or in "convert" of a wider one."""
        if self.prefix_cache == "off" or not request.shares_prefix:
            return []
        found: list[ListedPage] = []
        size = page_class.page_size
        # The last token is computed in any case, since what follows it is to be sampled.
        known = (min(num_tokens, request.num_tokens) - 1) // size
        for digest, tokens in prefix_pages(request.token_ids, size, b"", 0, known):
            listed = self._list.find(page_class, digest, tokens)
            if listed is None and self.prefix_cache == "convert":
                listed = self._find_wider(page_class, digest, tokens)
            # Whoever takes over a page that is not ready computes what follows, too: nothing ready may be among it.
            if listed is None or (listed.ready and found and not found[-1].ready):
                break
            found.append(listed)
        return found

    def _find_wider(self, page_class: PageClass, digest: bytes, tokens: bytes) -> ListedPage | None:
        for other in self._kv.classes.values():
            if other.model == page_class.model and other.page_bytes > page_class.page_bytes:
                listed = self._list.find(other, digest, tokens)
                if listed is not None and listed.ready:
                    return listed
        return None

    def _enter(self, request: Request, held: RequestPages, num_tokens: int, found: list[ListedPage]) -> None:
        """List a new request's full pages, convert what was found in other classes, and note what is computed."""
        size, page_class = held.page_class.page_size, held.page_class
        for index, listed in enumerate(found):
            held.digest = listed.digest
            if listed.page_class is not page_class:
                handle = held.page(index)[1]
                self._kv.copy(listed.handle, handle, listed.page_class, page_class)
                self._list.add(ListedPage(page_class, listed.digest, listed.tokens, handle, ready=True))
                self._kv.let_go([listed.handle])
                self._list.stats.converted_pages += 1
                held.exact = False
        held.num_listed = len(found)
        held.num_ready = next((i for i, listed in enumerate(found) if not listed.ready), len(found))
        held.waits = held.num_ready < len(found)
        request.num_computed_tokens = held.num_ready * size
        self._list.stats.asked_tokens += num_tokens
        self._list.stats.hit_tokens += size * len(found)
        if self._lists(request, held):
            self._extend(request, held, min(min(num_tokens, request.num_tokens) // size, held.num_pages), ready=False)

    def _lists(self, request: Request, held: RequestPages) -> bool:
        """Whether others may share what the request computes."""
        return request.shares_prefix and (
            self.prefix_cache == "convert" or (self.prefix_cache == "exact" and held.exact)
        )

    def _extend(self, request: Request, held: RequestPages, stop: int, ready: bool) -> None:
        """List the request's pages up to the page `stop`, as computed or to be computed by it."""
        size, writer = held.page_class.page_size, None if ready else request
        pages = prefix_pages(request.token_ids, size, held.digest, held.num_listed, stop)
        for run in held.parts(held.num_listed, stop):
            for handle, (digest, tokens) in zip(run.handles, pages, strict=False):
                self._list.add(ListedPage(run.page_class, digest, tokens, handle, writer, ready))
                held.digest = digest
        held.num_listed = max(held.num_listed, stop)
