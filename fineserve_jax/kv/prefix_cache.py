"""Cached blocks: full pages by the tokens they hold, so that requests which begin alike share them.

A block's *hash* covers its tokens and, through the hash of the block before, all tokens ahead of them. A block whose
reference count comes to 0 stays where it is, *evictable*, until its memory is wanted; evictable blocks are evicted in
LRU order. A block enters the cache when a request is about to compute it, so that others which arrive meanwhile wait
for it instead of computing it again.
"""

import hashlib
import itertools
from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.request.request import Request

PAGES_AT_A_TIME = 64
"""Pages that are looked at in one go: evictable ones, and a prompt's."""


@dataclass(eq=False, slots=True)
class CachedBlock:
    """A full page of known tokens.

    Attributes:
        block_hash: of its tokens and all before them.
        tokens: its token ids, i32 as bytes, compared on every hit.
        handle: of its page, see `kv/page_table.py`.
        writer: who is to compute it; None: it holds its keys and values, or whoever needs them next computes them.
        ready: whether it holds its keys and values.
    """

    page_class: PageClass
    block_hash: bytes
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
    """Which page holds which tokens. It counts no references: the reference count of an evictable page is 0.

    Args:
        page_units: units that a page of a class takes in the arena.

    Attributes:
        stats: counts since the start.
        by_handle: all cached blocks.
        evictable: handles of the blocks with reference count 0, in LRU order.
        evictable_pages, evictable_units: how many of a class there are, and units that all of them take.
    """

    def __init__(self, page_units: Callable[[PageClass], int]) -> None:
        self._page_units = page_units
        self.stats = PrefixStats()
        self.by_handle: dict[int, CachedBlock] = {}
        self.evictable: OrderedDict[int, None] = OrderedDict()
        self.evictable_pages: Counter[PageClass] = Counter()
        self.evictable_units = 0
        self._by_hash: dict[tuple[bytes, PageClass], CachedBlock] = {}

    def find(self, page_class: PageClass, block_hash: bytes, tokens: bytes) -> CachedBlock | None:
        """The block of that class with that hash, if its tokens are those, too."""
        block = self._by_hash.get((block_hash, page_class))
        return block if block is not None and block.tokens == tokens else None

    def add(self, block: CachedBlock) -> bool:
        """Cache a block, unless another one of its class is cached for the same tokens; whether it was."""
        key = (block.block_hash, block.page_class)
        if key in self._by_hash:
            return False
        self._by_hash[key] = self.by_handle[block.handle] = block
        return True

    def remove(self, handle: int) -> None:
        """Take a page out of the cache, if it is in it."""
        block = self.by_handle.pop(handle, None)
        if block is None:
            return
        del self._by_hash[block.block_hash, block.page_class]
        if handle in self.evictable:
            del self.evictable[handle]
            self._count_evictable(block.page_class, -1)

    def pin(self, handles: Sequence[int]) -> None:
        """The reference counts of pages are about to be raised: they are not evictable any more."""
        for handle in handles:
            if handle in self.evictable:
                del self.evictable[handle]
                self._count_evictable(self.by_handle[handle].page_class, -1)

    def in_lru_order(self) -> Iterator[int]:
        """Evictable pages, the least recently used first; each may be removed before the next is asked for."""
        passed = 0
        while some := list(itertools.islice(self.evictable, passed, passed + PAGES_AT_A_TIME)):
            yield from some
            passed += sum(handle in self.evictable for handle in some)

    def keep(self, handles: Sequence[int]) -> Sequence[int]:
        """Keep those ready of the pages whose reference counts came to 0, the last as the most recently used one; the
        pages that are not kept."""
        if not self.by_handle:
            return handles
        others = []
        for handle in handles:
            block = self.by_handle.get(handle)
            if block is not None and block.ready:
                self.evictable[handle] = None
                self._count_evictable(block.page_class, 1)
                continue
            if block is not None:
                self.remove(handle)
            others.append(handle)
        return others

    def _count_evictable(self, page_class: PageClass, change: int) -> None:
        self.evictable_pages[page_class] += change
        self.evictable_units += change * self._page_units(page_class)


def hash_blocks(
    token_ids: Sequence[int], page_size: int, block_hash: bytes, first: int, stop: int
) -> Iterator[tuple[bytes, bytes]]:
    """Hash and tokens (their ids, i32 as bytes) of each block from `first` to `stop`, all of them full.

    Args:
        block_hash: of the block before `first`; where that is the request's first, its `prefix_root`. 16 bytes, so that
            two prefixes practically never share one.
    """
    for begin in range(first, stop, PAGES_AT_A_TIME):
        end = min(begin + PAGES_AT_A_TIME, stop)
        words = array("i", token_ids[begin * page_size : end * page_size])
        some, length = words.tobytes(), page_size * words.itemsize
        for place in range(0, len(some), length):
            tokens = some[place : place + length]
            block_hash = hashlib.blake2b(block_hash + tokens, digest_size=16).digest()
            yield block_hash, tokens
