"""What quotas mean for the scheduler: who is admitted first, who is held back, and whose memory is reclaimed.

    owed        a waiting request that lies within a guarantee. It goes ahead of all that are not, and if memory or a
                place is short, rows that are not protected give way to it
    protected   a row of a quota that holds no more than its guarantee
    held back   a waiting request whose quota would exceed its maximum

What an owner does not use is lent: anyone may be admitted to it. Guarantees are always to be had: protected rows of
others hold no more than their guarantees, all guarantees together fit, and everything else can be reclaimed. They are
of memory: where protected rows have all places of a batch, an owner waits for one.
"""

from collections.abc import Callable, Mapping

from fineserve_jax.errors import RequestError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.quotas import Quota, QuotaAccount
from fineserve_jax.request import Request
from fineserve_jax.scheduler.rows import Row


class Quotas:
    """Quotas of a scheduler; without any, everything is allowed and nothing is owed.

    Args:
        kv: whose pages are counted.
        quotas: by name, see `kv.quotas`.
        rows: the admitted requests in the order of admission; the scheduler's, read only here.
        growth_pages: pages that admission leaves below a maximum for each of the quota's rows.
        preempt: takes a row's pages and makes its request wait.

    Attributes:
        account: None without quotas.
        num_reclaimed: rows that were preempted for an owner.
    """

    def __init__(
        self,
        kv: KVManager,
        quotas: Mapping[str, Quota],
        rows: dict[Request, Row],
        growth_pages: int,
        preempt: Callable[[Row], None],
    ) -> None:
        self.account = QuotaAccount(kv, quotas) if quotas else None
        self.num_reclaimed = 0
        self._kv, self._rows, self._growth_pages, self._preempt = kv, rows, growth_pages, preempt

    def check(self, model: str, kv_precision: str, tenant: str, num_tokens: int) -> None:
        """Raises RequestError for a request that could exceed a maximum on its own when it has so many tokens."""
        if self.account is None:
            return
        units = self.account.units(model, kv_precision, num_tokens)
        for name in self.account.names_of(tenant, kv_precision):
            if units > self.account.most[name]:
                raise RequestError(
                    f"a request of up to {num_tokens} tokens takes {units} units of memory, and quota {name!r} allows "
                    f"{self.account.most[name]}; lower max_tokens, or raise the quota's max"
                )

    def note(self, request: Request) -> None:
        """What the request holds has changed."""
        if self.account is not None:
            self.account.note(request)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the account says what requests hold."""
        if self.account is not None:
            self.account.check()

    def is_owed(self, request: Request) -> bool:
        if self.account is None:
            return False
        return self.account.is_under_guarantee(request, self._units(self.account, request))

    def admits(self, row: Row) -> bool:
        """Whether the row's maxima allow it its pages, and some growth to it and to those that are there."""
        if self.account is None:
            return True
        growth = self._growth_pages * self._kv.page_units(row.page_class)
        units = self._units(self.account, row.request)
        for name in self.account.names(row.request):
            others = self.account.num_requests[name]  # without any, it was checked at its greatest length
            if others and self.account.used[name] + units + (others + 1) * growth > self.account.most[name]:
                return False
        return True

    def blocks_growth(self, row: Row) -> Row | None:
        """Who has to give way so that the row can grow to its known tokens within its maxima: the latest admitted of
        the quota, perhaps itself; None if it can grow."""
        if self.account is None:
            return None
        page_units = self._kv.page_units
        demand = self._kv.demand(row.request, row.request.num_tokens)
        name = self.account.over(row.request, sum(page_units(c) * count for c, count in demand.items()))
        if name is None:
            return None
        return next(r for r in reversed(self._rows.values()) if name in self.account.names(r.request))

    def may_give_way(self, row: Row) -> bool:
        """Whether the row's memory may be taken for others."""
        return self.account is None or self.account.is_preemptible(row.request)

    def reclaim(self, row: Row) -> bool:
        """Preempt the latest admitted row that is not protected and competes with `row`; whether there was one."""
        for other in reversed(self._rows.values()):
            if self.may_give_way(other) and other.competes_with(row):
                self._preempt(other)
                self.num_reclaimed += 1
                return True
        return False

    def _units(self, account: QuotaAccount, request: Request) -> int:
        """Units that the request's known tokens take."""
        return account.units(request.model, request.kv_precision, request.num_tokens)
