"""What a request starts with: leading blocks that others have computed, or are to compute, in all layer groups."""

from dataclasses import dataclass
from typing import TypeAlias

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.prefix_cache import CachedBlock

Row: TypeAlias = tuple[CachedBlock | None, ...]  # a block of a prefix: its page in each layer group, if it is cached


@dataclass(frozen=True, slots=True)
class Prefix:
    """What a request starts with.

    Attributes:
        page_class: the request's.
        rows: its leading blocks that are shared.
        num_ready: how many of them hold their keys and values; the others are yet to be computed.
    """

    page_class: PageClass
    rows: list[Row]
    num_ready: int

    @property
    def num_tokens(self) -> int:
        """Tokens of the shared blocks."""
        return len(self.rows) * self.page_class.page_size

    @property
    def num_own(self) -> int:
        """How many blocks are in the request's own format, up to the first that is not."""
        pairs = (zip(row, self.page_class.groups, strict=True) for row in self.rows)
        own = [all(block is None or block.page_class is mine for block, mine in pair) for pair in pairs]
        return own.index(False) if False in own else len(own)

    def first_page(self, own: PageClass) -> int:
        """The first page that the request needs of a group: that from which on its tokens attend to what is ready."""
        return own.first_page(self.num_ready * self.page_class.page_size)

    def blocks(self, group: int) -> list[CachedBlock]:
        """The blocks that the request needs of a group, from `first_page` on."""
        first = self.first_page(self.page_class.groups[group])
        return [block for row in self.rows[first:] if (block := row[group]) is not None]


def num_ready_blocks(rows: list[Row], page_class: PageClass) -> int:
    """How many leading blocks can be shared as they are: of those that tokens behind them attend to, all are ready."""
    num_ready, adjacent = 0, [0] * len(page_class.groups)
    for index, row in enumerate(rows, 1):
        # How many adjacent blocks up to this one are ready, in each group.
        adjacent = [count + 1 if block and block.ready else 0 for count, block in zip(adjacent, row, strict=True)]
        firsts = (own.first_page(index * page_class.page_size) for own in page_class.groups)
        if all(index - count <= first for count, first in zip(adjacent, firsts, strict=True)):
            num_ready = index
    return num_ready


def is_to_come(row: Row) -> bool:
    """Whether a block is cached in all groups and yet to be computed, by one request, or by whoever needs it next."""
    blocks = [block for block in row if block is not None and not block.ready]
    return len(blocks) == len(row) and all(block.writer is blocks[0].writer for block in blocks)
