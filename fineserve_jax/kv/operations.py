"""What the device has to do with pages: copy them, requantize them, save them to host memory, load them from there.

Operations are queued as pages change hands and carried out in that order before the next step computes anything. So a
page may be given to another request as soon as an operation that reads it is queued.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fineserve_jax.kv.classes import PageClass


@dataclass(frozen=True, slots=True)
class Copy:
    """Copy a page, first unit to first unit; requantize it if the classes differ."""

    source: int
    target: int
    source_class: PageClass
    target_class: PageClass


@dataclass(eq=False, slots=True)
class HostPages:
    """Pages in host memory.

    Attributes:
        classes: class of each run of pages, in order.
        counts: pages of each run.
        words: u16[pages, page_units, *unit_shape] of each run; empty until the device has delivered them.
    """

    classes: list[PageClass]
    counts: list[int]
    words: list[Any] = field(default_factory=list)

    @property
    def num_units(self) -> int:
        """Units that all of them take in the arena."""
        return sum(c.page_units * count for c, count in zip(self.classes, self.counts, strict=True))


@dataclass(frozen=True, slots=True)
class Save:
    """Copy pages to host memory; `units` lists the first units of each run in `pages`."""

    pages: HostPages
    units: list[list[int]]


@dataclass(frozen=True, slots=True)
class Load:
    """Copy pages back from host memory."""

    pages: HostPages
    units: list[list[int]]


PageOperation: TypeAlias = Copy | Save | Load
