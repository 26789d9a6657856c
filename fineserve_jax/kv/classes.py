"""The kinds of page an arena holds: what a page takes, and how many a request needs.

A *unit* is a fixed-size row of the arena; a page is a run of whole units and is named by its first one. A model's
layers form *groups* by how far back they attend, one in most models; a page holds tokens of one group's layers.
"""

import zlib
from dataclasses import dataclass, field

from fineserve_jax.errors import ConfigError


@dataclass(frozen=True, slots=True)
class PageClass:
    """Pages of one layer group of a model in one KV precision, all of one length.

    Attributes:
        model: name of the model.
        kv_format: name of the KV format that they are in.
        page_units: units that a page of all layers of the group takes.
        page_size: tokens a page holds.
        page_bytes: exact bytes of a full page's values and scales, at most `page_units` units.
        residual: class of the newest, unfilled page, for a format that can only encode whole pages; None for a
            format that encodes token by token.
        group: number of the layer group.
        window: how many newest tokens the group's layers attend to, a token itself included; None: all. At least 2, so
            that the block ahead of a token is always attended to.
        span: with a window, most tokens of a request that have pages at a time: those of the window, and those that a
            step computes; None: whatever a request is long.
        others: classes of the model's other layer groups in the same format. A request has pages in all of them; its
            class is that of the first group.
        recipe: name of the KV precision, where layer groups are in different formats; None: it is called as the format.

    Raises:
        ConfigError: a length below 1, a residual page that does not fit its class, or a span within the window.
    """

    model: str
    kv_format: str
    page_units: int
    page_size: int
    page_bytes: int
    residual: "PageClass | None" = None
    group: int = 0
    window: int | None = None
    span: int | None = None
    others: "tuple[PageClass, ...]" = ()
    recipe: str | None = None
    _hash: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # The generated hash would walk the residual class on each of a step's thousands of look-ups; a model and
        # format have one class in an arena. It is the same in every process, since a pickled class takes it along.
        object.__setattr__(self, "_hash", zlib.crc32(str(self).encode()))
        for name in ("page_units", "page_size", "page_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} of {self}: a page needs at least 1")
        if self.window is not None and not 2 <= self.window < (self.span or self.window + 1):
            raise ConfigError(f"{self}: window={self.window} must be at least 2, and span={self.span} more than that")
        if self.residual is None:
            return
        if self.residual.residual is not None:
            raise ConfigError(
                f"the residual page of {self} is {self.residual}, "
                "which has a residual page itself; use a token-wise format"
            )
        own, residual = ((c.model, c.group, c.page_size) for c in (self, self.residual))
        if residual != own:
            raise ConfigError(
                f"the residual page of {self} holds {self.residual.page_size} tokens of {self.residual.model!r}; "
                f"it must hold {self.page_size} of {self.model!r}"
            )

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.model}/{self.precision_and_group}"

    @property
    def precision(self) -> str:
        """The KV precision, as requests name it: a KV format, or a recipe."""
        return self.recipe or self.kv_format

    @property
    def precision_and_group(self) -> str:
        """The KV precision, and the number of the group unless it is the first: "int8", "int8 (group 1)"."""
        return f"{self.precision} (group {self.group})" if self.group else self.precision

    @property
    def groups(self) -> "tuple[PageClass, ...]":
        """The classes that a request of this class has pages in, one for each layer group; residual pages aside."""
        return (self, *self.others)

    @property
    def bytes_of_groups(self) -> int:
        """Exact bytes of a full page of each layer group, together: of so many tokens in all layers."""
        return sum(group.page_bytes for group in self.groups)

    def holds_at_least(self, other: "PageClass") -> bool:
        """Whether no layer group has shorter pages than in another precision of the model."""
        return all(own.page_bytes >= theirs.page_bytes for own, theirs in zip(self.groups, other.groups, strict=True))

    # -- pages of this group, numbered from the first position on, the residual page aside -------------------------

    def num_pages(self, num_tokens: int) -> int:
        """Number behind the last page that the first `num_tokens` tokens of a request need."""
        if self.residual is None:
            return -(-num_tokens // self.page_size)
        return num_tokens // self.page_size

    def first_token(self, num_computed: int) -> int:
        """The first position that tokens from `num_computed` on attend to."""
        return 0 if self.window is None else max(0, num_computed - self.window + 1)

    def first_page(self, num_computed: int) -> int:
        """The first page that tokens from `num_computed` on attend to."""
        return self.first_token(num_computed) // self.page_size

    def end_page(self, num_tokens: int, num_computed: int) -> int:
        """Number behind the last page to have, of a request of which so many tokens are known and computed: where there
        is a window, pages for what a step computes are enough."""
        if self.window is not None and self.span is not None:
            num_tokens = min(num_tokens, num_computed + self.span - self.window)
        return self.num_pages(num_tokens)

    def most_pages(self, num_tokens: int) -> int:
        """Most pages that a request has at a time until its first `num_tokens` tokens are computed."""
        if self.window is None or self.span is None:
            return self.num_pages(num_tokens)
        # From the first token in the window to the last one that a step computes are `span - 1` tokens.
        return min(self.num_pages(num_tokens), (self.span - 2 + self.page_size - 1) // self.page_size + 1)

    # -- pages of all groups -----------------------------------------------------------------------------------------

    def room(self, num_tokens: int, num_computed: int) -> int:
        """Tokens that the pages of a request with so many known and computed tokens, the residual pages included, have
        room for."""
        pages = [(c.end_page(num_tokens, num_computed), c.residual is not None) for c in self.groups]
        return min(count * self.page_size + (self.page_size - 1) * has_residual for count, has_residual in pages)

    def demand(self, num_tokens: int) -> "dict[PageClass, int]":
        """Most pages by class that a request has at a time until its first `num_tokens` tokens are computed; no zero
        entries."""
        demand: dict[PageClass, int] = {}
        for page_class in self.groups if num_tokens > 0 else ():
            demand |= page_class.with_residual(page_class.most_pages(num_tokens))
        return demand

    def with_residual(self, count: int) -> "dict[PageClass, int]":
        """So many pages of this group, and its residual page if it has one."""
        demand = {self: count} if count > 0 else {}
        return demand if self.residual is None else demand | {self.residual: 1}


class PageClasses(dict[tuple[str, str], PageClass]):
    """Page class of each model and KV precision that requests may name: that of the first layer group.

    Raises:
        ConfigError: when asked for a pair that is not there.
    """

    def __missing__(self, key: tuple[str, str]) -> PageClass:
        known = ", ".join(f"{model}/{precision}" for model, precision in self) or "none"
        raise ConfigError(f"no KV cache for {'/'.join(key)}; this engine has: {known}")
