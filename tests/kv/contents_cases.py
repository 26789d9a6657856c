"""A device without arithmetic: it remembers what each page holds, token by token, and how that came about."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.operations import Copy, PageOperation, Save


class Cell(NamedTuple):
    """The keys and values of one token.

    Attributes:
        prefix: the model and all tokens up to this one, which they depend on.
        computed_in: KV precision of the request that computed them.
        formats: what they were encoded in, one after the other.
        pure: whether all that they attended to was as computing the tokens alone in `computed_in` gives it.
    """

    prefix: tuple
    computed_in: str
    formats: tuple[str, ...]
    pure: bool

    def encoded(self, kv_format: str) -> "Cell":
        return self._replace(formats=(*self.formats, kv_format))


def formats_of(page_class: PageClass, in_residual: bool) -> tuple[str, ...]:
    """What a token that is computed in a class has been encoded in."""
    residual = () if page_class.residual is None else (page_class.residual.kv_format,)
    return residual if in_residual else (*residual, page_class.kv_format)


def alone(page_class: PageClass, tokens: Sequence[int], position: int, in_residual: bool) -> Cell:
    """The cell that computing the tokens alone in a class gives."""
    prefix = (page_class.model, *tokens[: position + 1])
    return Cell(prefix, page_class.precision, formats_of(page_class, in_residual), True)


Cells = tuple[Cell | None, ...]


@dataclass
class FakeDevice:
    """`pages`: first unit -> class and cells of what was last written there; what it overlapped is gone."""

    pages: dict[int, tuple[PageClass, Cells]] = field(default_factory=dict)

    def read(self, unit: int, page_class: PageClass) -> Cells:
        """The cells of a page; None for each that was not written as a page of this class."""
        found, cells = self.pages.get(unit, (None, ()))
        return cells if found is page_class else (None,) * page_class.page_size

    def write(self, unit: int, page_class: PageClass, cells: Cells) -> None:
        stop = unit + page_class.page_units
        for other in [u for u, (c, _) in self.pages.items() if u < stop and unit < u + c.page_units]:
            del self.pages[other]
        self.pages[unit] = (page_class, cells)

    def write_token(self, unit: int, page_class: PageClass, offset: int, cell: Cell) -> None:
        cells = self.read(unit, page_class)
        self.write(unit, page_class, (*cells[:offset], cell, *cells[offset + 1 :]))

    def apply(self, operation: PageOperation) -> None:
        if isinstance(operation, Copy):
            self.write(operation.target, operation.target_class, self.copied(operation))
            return
        pages = operation.pages
        if isinstance(operation, Save):
            for page_class, units in zip(pages.classes, operation.units, strict=True):
                pages.words.append([self.read(unit, page_class) for unit in units])
            assert [len(words) for words in pages.words] == pages.counts
            return
        for page_class, units, words in zip(pages.classes, operation.units, pages.words, strict=True):
            for unit, cells in zip(units, words, strict=True):
                self.write(unit, page_class, cells)

    def copied(self, copy: Copy) -> Cells:
        """What a copy writes. Only full pages can be converted."""
        cells = self.read(copy.source, copy.source_class)
        if copy.source_class is copy.target_class:
            return cells
        assert None not in cells, f"{copy} converts a page that is not full"
        return tuple(cell.encoded(copy.target_class.kv_format) for cell in cells if cell is not None)


def clashes(batch: Sequence[Copy]) -> Iterator[tuple[Copy, Copy]]:
    """Pairs of copies of which one writes what the other reads or writes."""
    for i, copy in enumerate(batch):
        target = range(copy.target, copy.target + copy.target_class.page_units)
        for j, other in enumerate(batch):
            read = range(other.source, other.source + other.source_class.page_units)
            written = range(other.target, other.target + other.target_class.page_units)
            if _overlap(target, read) or (i != j and _overlap(target, written)):
                yield copy, other


def _overlap(a: range, b: range) -> bool:
    return a.start < b.stop and b.start < a.stop
