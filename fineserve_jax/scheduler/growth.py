"""Memory for the rows that decode: each step some outgrow their pages, and if need be others give way to them.

Who gives way is the latest admitted of those that compete for the same memory, be it the row itself. Only a row that
quotas protect takes pages of rows from before it, if these are not protected.
"""

from collections.abc import Callable, Sequence

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request import Request
from fineserve_jax.scheduler.pressure import Pressure
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.rows import GrowthReserve, Row


class Growth:
    """Grows rows.

    Args:
        kv: gives the pages.
        rows: the admitted requests in the order of admission; the scheduler's, read only here.
        reserve: what rows may still want; told of each that has grown.
        pressure: makes room by narrowing pages of the admitted rows.
        quotas: who may have no more, and who need not give way.
        preempt: takes a row's pages and makes its request wait.
    """

    def __init__(
        self,
        kv: KVManager,
        rows: dict[Request, Row],
        reserve: GrowthReserve,
        pressure: Pressure,
        quotas: Quotas,
        preempt: Callable[[Row], None],
    ) -> None:
        self._kv, self._rows, self._reserve = kv, rows, reserve
        self._pressure, self._quotas, self._preempt = pressure, quotas, preempt

    def make_room(self) -> bool:
        """Grow every row whose tokens have outgrown its pages, oldest admission first; whether any row was
        preempted for it."""
        rows = [row for row in self._rows.values() if len(row.request.token_ids) > row.covered_tokens]
        if self._grow_together(rows):
            return False
        any_preempted = False
        for row in rows:
            if row.request in self._rows:
                any_preempted |= self._grow(row)
        return any_preempted

    def _grow_together(self, rows: Sequence[Row]) -> bool:
        """Grow all these rows at once, or none: where memory is short, or shares of it are to be kept, each has to ask
        for itself."""
        if self._pressure.can_narrow or self._quotas.account is not None:
            return False
        if not self._kv.grow_together([row.request for row in rows]):
            return False
        for row in rows:
            row.note_growth()
            self._reserve.update(row)
        return True

    def _grow(self, row: Row) -> bool:
        """Grow a row to hold its known tokens, or preempt it when nobody can give way to it; whether any was
        preempted."""
        request, any_preempted = row.request, False
        while (victim := self._quotas.blocks_growth(row)) or not self._has_room(row):
            victim = victim or self._victim(row)
            self._preempt(victim)
            any_preempted = True
            if victim is row:
                return any_preempted
        self._quotas.note(request)
        row.note_growth()
        self._reserve.update(row)
        return any_preempted

    def _has_room(self, row: Row) -> bool:
        """Grow a row, narrowing others' pages as need be. While any can be, the reserve of free slabs is left alone:
        narrower pages have to go somewhere before those they were encoded from are free."""
        request, kv = row.request, self._kv
        if self._pressure.can_narrow:
            while not (kv.is_compacting or kv.grow(request, request.num_tokens, leaving={})):
                if not self._pressure.narrow(row.shares):
                    break
        while not kv.grow(request, request.num_tokens):
            if not (self._pressure.can_narrow and self._pressure.narrow(row.shares)):
                return False
        return True

    def _victim(self, row: Row) -> Row:
        """Who gives up its pages so that `row` can grow: the latest admitted after it, of its own page class
        if there is one, since those pages are of use at once; `row` itself when all that compete were
        admitted before it. Rows that quotas protect are spared if others can give way, even earlier ones if `row` is
        protected, too."""
        rows = [other for other in reversed(self._rows.values()) if other is row or other.competes_with(row)]
        if len(rows) == 1 and not self._kv.holds(row.request).exact:
            return row  # narrowed, its pages take slabs of several formats; computed again, they are in one
        if len(rows) == 1:
            raise RuntimeError(
                f"request {row.request.request_id} cannot grow to {row.request.num_tokens} tokens although "
                "no other competes for its memory; the engine must refuse requests that do not fit alone "
                "(KVManager.fits_alone)"
            )
        later = rows[: rows.index(row)]
        yielding = [other for other in later if self._quotas.may_give_way(other)]
        if not yielding and not self._quotas.may_give_way(row):
            yielding = [other for other in rows if self._quotas.may_give_way(other)] or later
        own_class = (other for other in yielding if other.page_class is row.page_class)
        return next(own_class, yielding[0] if yielding else row)
