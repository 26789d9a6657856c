"""What quotas mean for the scheduler: who is admitted first, who is held back, and whose memory may be taken.

    under guarantee   a waiting request that lies within a guarantee. It goes ahead of all that do not, and if memory
                      or a batch slot is short, preemptible requests give way to it
    preemptible       a running request whose quotas all hold more than they are guaranteed
    held back         a waiting request whose quota would exceed its maximum

What an owner does not use is lent: anyone may be admitted to it. Guarantees are always to be had: requests of others
that are not preemptible hold no more than their guarantees, all guarantees together fit, and everything else can be
reclaimed. They are of memory: where requests that are not preemptible have all batch slots, an owner waits for one.
"""

from collections.abc import Mapping

from fineserve_jax.errors import RequestError
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.quotas import Quota, QuotaAccount
from fineserve_jax.request.request import Request


class Quotas:
    """Quotas of a scheduler; without any, everything is allowed and nothing is guaranteed.

    Args:
        kv: whose pages are counted.
        quotas: by name, see `kv.quotas`.
        growth_pages: pages that admission leaves below a maximum for each of the quota's requests.

    Attributes:
        account: None without quotas.
    """

    def __init__(self, kv: KVManager, quotas: Mapping[str, Quota], growth_pages: int) -> None:
        self.account = QuotaAccount(kv, quotas) if quotas else None
        self._kv, self._growth_pages = kv, growth_pages

    def check(self, model: str, kv_precision: str, tenant: str, num_tokens: int) -> None:
        """Raises RequestError for a request that could exceed a maximum on its own when it has so many tokens."""
        if self.account is None:
            return
        units = self.account.units(model, kv_precision, num_tokens)
        for name in self.account.names_of(tenant, kv_precision, model):
            if units > self.account.most[name]:
                raise RequestError(
                    f"a request of up to {num_tokens} tokens takes {units} units of memory, and quota {name!r} allows "
                    f"{self.account.most[name]}; lower max_tokens, or raise the quota's max"
                )

    def note(self, request: Request) -> None:
        """What the request holds has changed."""
        if self.account is not None:
            self.account.note(request)

    def note_classes(self) -> None:
        """The models that are served have changed; see `QuotaAccount.note_classes`."""
        if self.account is not None:
            self.account.note_classes()

    def check_integrity(self) -> None:
        """Raises IntegrityError unless the account says what requests hold."""
        if self.account is not None:
            self.account.check()

    def is_under_guarantee(self, request: Request) -> bool:
        """Whether a waiting request, with all its known tokens, lies within a guarantee."""
        if self.account is None:
            return False
        return self.account.is_under_guarantee(request, self._units(self.account, request))

    def is_preemptible(self, request: Request) -> bool:
        """Whether a running request's memory may be taken for others."""
        return self.account is None or self.account.is_preemptible(request)

    def admits(self, request: Request, page_class: PageClass) -> bool:
        """Whether the maxima allow a waiting request its pages, and some growth to it and to those that run."""
        if self.account is None:
            return True
        growth = self._growth_pages * sum(map(self._kv.page_units, page_class.groups))
        units = self._units(self.account, request)
        for name in self.account.names(request):
            others = self.account.num_requests[name]  # without any, it was checked at its greatest length
            if others and self.account.used[name] + units + (others + 1) * growth > self.account.most[name]:
                return False
        return True

    def exceeded_by_growth(self, request: Request) -> str | None:
        """A quota whose maximum a running request would exceed with pages for all its known tokens; None if none."""
        if self.account is None:
            return None
        demand = self._kv.demand(request, request.num_tokens)
        return self.account.over(
            request, sum(self._kv.page_units(page_class) * count for page_class, count in demand.items())
        )

    def counts_against(self, request: Request, name: str) -> bool:
        """Whether a request counts against the quota of that name."""
        return self.account is not None and name in self.account.names(request)

    def _units(self, account: QuotaAccount, request: Request) -> int:
        """Units that the request's known tokens take."""
        return account.units(request.model, request.kv_precision, request.num_tokens)
