"""Level 1: which waiting requests get memory.

A walk goes through the waiting requests in the policy's order. One that finds no memory stays WAITING and
closes its own group (model and KV format) for the rest of the walk, since whoever comes later in the group
shall not overtake it; other groups go on, for their pool may have room.

Overtaking has an end. Where pools share memory, cheap requests that keep coming could take each freed slab
before a request that needs more of them ever sees enough. So once the oldest waiting request of a closed
group has waited `ageing_s`, the walk closes every group that competes for the same memory, too: memory then
drains until the old request fits. Hence, under `fineserve` and `fcfs`:

    no request is admitted ahead of one that came more than `ageing_s` earlier and competes for its memory.

Late requests (see `waiting`), and those of other policies, are bound by `overtaking_limit_s` in its place.

(At that moment the older one has waited over `ageing_s`, and has the smaller key. In the same group it is
tried first; in another its group's head is, and the walk goes on only if nothing in that group was closed
before it.)

With quotas (see `quotas`) the requests that are owed memory come before all others, and tenants have groups of their
own.
"""

from collections import Counter

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.page_pool import Demand
from fineserve_jax.scheduler.pressure import Pressure
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.rows import GrowthReserve, Row, shares_of
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig
from fineserve_jax.scheduler.waiting import Entry, Group, WaitingQueue


class Admission:
    """Walks the waiting queue and grows what fits.

    Args:
        config: batch size, reserve and ageing.
        kv: gives the pages.
        queue: the waiting requests; admitted ones are removed from it.
        reserve: what the admitted rows may still want; new rows are added to it.
        pressure: makes room by narrowing pages of the admitted rows.
        quotas: who is owed memory, and who may have no more.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        queue: WaitingQueue,
        reserve: GrowthReserve,
        pressure: Pressure,
        quotas: Quotas,
    ) -> None:
        self._config = config
        self._reserve = reserve
        self._pressure = pressure
        self._quotas = quotas
        self._kv = kv
        self._queue = queue
        self._num_walks = 0
        self.owes = False  # whether the last walk left a request without what it was owed

    def walk(self, places: int, now: float) -> list[Row]:
        """Admit up to `places` requests, as memory allows.

        Returns:
            The new rows in the order of admission, each holding the pages of all its known tokens. Every row
            that competes with a new one can still grow by the reserve.
        """
        self._num_walks += 1
        self.owes = False
        open_groups = self._queue.groups()
        admitted: list[Row] = []
        while open_groups and (entry := self._first(open_groups, now)):
            row = self._row(entry)
            owed = self._quotas.is_owed(row.request)
            if not self._quotas.admits(row):
                open_groups = [group for group in open_groups if group != self._queue.group_of(row.request)]
                continue
            if len(admitted) >= places:
                if not (owed and self._quotas.reclaim(row)):
                    break
                places += 1
            if self._grow(row, owed):
                self._queue.remove(row.request)
                self._quotas.note(row.request)
                row.note_growth()
                self._reserve.add(row)
                admitted.append(row)
            elif owed:
                self.owes = True  # pages are being moved together for it; nobody shall take them meanwhile
                break
            else:
                open_groups = self._close(row, open_groups, now)
        return admitted

    def _first(self, groups: list[Group], now: float) -> Entry | None:
        heads = [head for group in groups if (head := self._queue.head(group, now)) is not None]
        owed = [head for head in heads if self._quotas.is_owed(head.request)]
        return min(owed or heads, default=None)

    def _row(self, entry: Entry) -> Row:
        request = entry.request
        page_class = self._kv.class_of(request.model, request.kv_precision)
        return Row(request, page_class, shares_of(self._kv, page_class), self._num_walks, (entry.rank, entry.key))

    def _grow(self, row: Row, owed: bool) -> bool:
        """Give the row its pages if that leaves the reserve; a row alone in its memory needs none. For one that is
        owed them others give way, and the reserve if need be."""
        request, leaving = row.request, self._reserve.beside(row)
        while not self._kv.grow(request, request.num_tokens, leaving):
            if self._kv.is_compacting:
                return False  # what is free has only to be moved together, in the next steps
            if self._narrowing_may_help(row, leaving) and self._pressure.narrow(row.shares):
                continue
            if not (owed and self._quotas.reclaim(row)):
                return owed and self._kv.grow(request, request.num_tokens)
            leaving = self._reserve.beside(row)
        return True

    def _narrowing_may_help(self, row: Row, leaving: Demand | None) -> bool:
        """Whether the row could have its pages if all that may be narrowed were; nothing is narrowed in vain."""
        if not self._pressure.can_narrow:
            return False
        kv, request = self._kv, row.request
        wanted = Counter(kv.demand(request, request.num_tokens))
        wanted.update(leaving or {})
        lacking = kv.lacking_units(wanted, 0 if leaving is None else kv.reserve_slabs)
        return lacking <= self._pressure.most_units(row.shares)

    def _close(self, row: Row, groups: list[Group], now: float) -> list[Group]:
        """Groups that stay open after `row` found no memory."""
        own = self._queue.group_of(row.request)
        groups = [group for group in groups if group != own]
        if not self._queue.is_overdue(own, now, self._config.ageing_s):
            return groups
        return [group for group in groups if row.shares.isdisjoint(self._shares(group))]

    def _shares(self, group: Group) -> frozenset[str]:
        model, kv_format = group[:2]
        return shares_of(self._kv, self._kv.class_of(str(model), str(kv_format)))
