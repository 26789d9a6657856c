"""Full pages by what they hold, so that requests which begin alike share them.

A page's *digest* covers its tokens and, through the digest of the page before, all tokens ahead of them. Pages that
nobody holds any more stay where they are until their memory is wanted, and are then evicted, the one that was let go
of first first. A page is listed when a request is about to compute it, so that others which arrive meanwhile wait for
it instead of computing it again.
"""

import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.request import Request

PAGES_AT_A_TIME = 64
"""Pages that are looked at in one go: idle ones, and a prompt's."""


@dataclass(eq=False, slots=True)
class ListedPage:
    """A full page of known tokens.

    Attributes:
        digest: of its tokens and all before them.
        tokens: its token ids, i32 as bytes, compared on every hit.
        writer: who is to compute it; None: it holds its keys and values, or whoever needs them next computes them.
        ready: whether it holds its keys and values.
    """

    page_class: PageClass
    digest: bytes
    tokens: bytes
    handle: int
    writer: Request | None = None
    ready: bool = False


@dataclass(slots=True)
class PrefixStats:
    """Counts since the start: tokens asked for, tokens found, pages converted from another format, pages evicted."""

    asked_tokens: int = 0
    hit_tokens: int = 0
    converted_pages: int = 0
    evicted_pages: int = 0


class PrefixCache:
    """Which page holds which tokens. It holds no pages itself: an idle page's handle has no holders.

    Args:
        page_units: units that a page of a class takes in the arena.
    """

    def __init__(self, page_units: Callable[[PageClass], int]) -> None:
        self._page_units = page_units
        self.stats = PrefixStats()
        self.by_handle: dict[int, ListedPage] = {}
        self.idle: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self.idle_pages: Counter[PageClass] = Counter()
        self.idle_units = 0
        self._by_digest: dict[tuple[bytes, PageClass], ListedPage] = {}

    def find(self, page_class: PageClass, digest: bytes, tokens: bytes) -> ListedPage | None:
        """The page of that class with those tokens, after those that the digest covers."""
        listed = self._by_digest.get((digest, page_class))
        return listed if listed is not None and listed.tokens == tokens else None

    def add(self, listed: ListedPage) -> bool:
        """List a page, unless another one is listed for the same tokens; whether it was."""
        key = (listed.digest, listed.page_class)
        if key in self._by_digest:
            return False
        self._by_digest[key] = self.by_handle[listed.handle] = listed
        return True

    def forget(self, handle: int) -> None:
        """Strike a page off the list, if it is on it."""
        listed = self.by_handle.pop(handle, None)
        if listed is None:
            return
        del self._by_digest[listed.digest, listed.page_class]
        if handle in self.idle:
            del self.idle[handle]
            self._count_idle(listed.page_class, -1)

    def hold(self, handle: int) -> None:
        """A listed page gets a holder."""
        if handle in self.idle:
            del self.idle[handle]
            self._count_idle(self.by_handle[handle].page_class, -1)

    def least_recent(self) -> Iterator[int]:
        """Idle pages, the least recently used first; each may be forgotten before the next is asked for."""
        passed = 0
        while some := list(itertools.islice(self.idle, passed, passed + PAGES_AT_A_TIME)):
            yield from some
            passed += sum(handle in self.idle for handle in some)

    def keep(self, handles: Sequence[int]) -> Sequence[int]:
        """Keep what is ready of pages that have lost their last holders, the last one as the most recently used;
        the pages that are not kept."""
        if not self.by_handle:
            return handles
        others = []
        for handle in handles:
            listed = self.by_handle.get(handle)
            if listed is not None and listed.ready:
                self.idle[handle] = None
                self._count_idle(listed.page_class, 1)
                continue
            if listed is not None:
                self.forget(handle)
            others.append(handle)
        return others

    def _count_idle(self, page_class: PageClass, change: int) -> None:
        self.idle_pages[page_class] += change
        self.idle_units += change * self._page_units(page_class)


def prefix_pages(
    token_ids: Sequence[int], page_size: int, digest: bytes, first: int, stop: int
) -> Iterator[tuple[bytes, bytes]]:
    """Digest and tokens (their ids, i32 as bytes) of each page from `first` to `stop`, all of them full.

    Args:
        digest: of the pages before `first`; b"" for none. 16 bytes, so that two prefixes practically never share one.
    """
    for begin in range(first, stop, PAGES_AT_A_TIME):
        end = min(begin + PAGES_AT_A_TIME, stop)
        words = array("i", token_ids[begin * page_size : end * page_size])
        some, length = words.tobytes(), page_size * words.itemsize
        for place in range(0, len(some), length):
            tokens = some[place : place + length]
            digest = hashlib.blake2b(digest + tokens, digest_size=16).digest()
            yield digest, tokens
