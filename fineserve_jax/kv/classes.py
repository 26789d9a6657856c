"""The kinds of page an arena holds: what a page takes, and how many a request needs.

A *unit* is a fixed-size row of the arena; a page is a run of whole units and is named by its first one.
"""

import zlib
from dataclasses import dataclass, field

from fineserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PageClass:
    """Pages of one model in one KV format, all of one length.

    Attributes:
        model: name of the model.
        kv_format: name of the KV format.
        page_units: units that a page of all layers takes.
        page_size: tokens a page holds.
        page_bytes: exact bytes of a full page's values and scales, at most `page_units` units.
        residual: class of the newest, unfilled page, for a format that can only encode whole pages; None for a
            format that encodes token by token.

    Raises:
        ConfigError: a length below 1, or a residual page that does not fit its class.
    """

    model: str
    kv_format: str
    page_units: int
    page_size: int
    page_bytes: int
    residual: "PageClass | None" = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The generated hash would walk the residual class on each of a step's thousands of look-ups; a model and
        # format have one class in an arena. It is the same in every process, since a pickled class takes it along.
        object.__setattr__(self, "_hash", zlib.crc32(str(self).encode()))
        for name in ("page_units", "page_size", "page_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} of {self}: a page needs at least 1")
        if self.residual is None:
            return
        if self.residual.residual is not None:
            raise ConfigError(
                f"the residual page of {self} is {self.residual}, "
                "which has a residual page itself; use a token-wise format"
            )
        if (self.residual.model, self.residual.page_size) != (self.model, self.page_size):
            raise ConfigError(
                f"the residual page of {self} holds {self.residual.page_size} tokens of {self.residual.model!r}; "
                f"it must hold {self.page_size} of {self.model!r}"
            )

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.model}/{self.kv_format}"

    def num_pages(self, num_tokens: int) -> int:
        """Pages of this class, the residual page aside, that the first `num_tokens` tokens of a request need."""
        if self.residual is None:
            return -(-num_tokens // self.page_size)
        return num_tokens // self.page_size

    def room(self, num_tokens: int) -> int:
        """Tokens that the pages of the first `num_tokens` tokens, the residual page included, have room for."""
        if self.residual is None:
            return self.num_pages(num_tokens) * self.page_size
        return (self.num_pages(num_tokens) + 1) * self.page_size - 1

    def demand(self, num_tokens: int) -> "dict[PageClass, int]":
        """Pages by class that give the first `num_tokens` tokens of a request a home; no zero entries."""
        if num_tokens <= 0:
            return {}
        pages = self.num_pages(num_tokens)
        demand = {self: pages} if pages else {}
        return demand if self.residual is None else demand | {self.residual: 1}


class PageClasses(dict[tuple[str, str], PageClass]):
    """Page class of each model and KV format that requests may name.

    Raises:
        ConfigError: when asked for a pair that is not there.
    """

    def __missing__(self, key: tuple[str, str]) -> PageClass:
        known = ", ".join(f"{model}/{kv_format}" for model, kv_format in self) or "none"
        raise ConfigError(f"no KV cache for {'/'.join(key)}; this engine has: {known}")
