"""When pages are narrowed, and whose: what is done when memory is short, before anybody is preempted.

Narrowing encodes older pages of requests that allow it (`min_kv_precision`) in a narrower format; the latest admitted
request goes first.
"""

from collections.abc import Mapping

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.running_request import RunningRequest
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

PAGES_AT_A_TIME = 32


class NarrowingPolicy:
    """Narrows pages of running requests.

    Args:
        config: newest pages to keep wide.
        kv: whose pages.
        running: the admitted requests.
        quotas: say whose memory is under a guarantee, so that it is not narrowed for others; told of what was.
        profiles: by model, know the bits of each format.

    Attributes:
        can_narrow: whether any request allowed narrowing when the step began.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        running: RunningRequests,
        quotas: Quotas,
        profiles: Mapping[str, StepProfile],
    ) -> None:
        self._config, self._kv, self._running, self._quotas = config, kv, running, quotas
        self._profiles = profiles
        self.can_narrow = False

    def begin_step(self) -> None:
        """Narrow pages until the reserve of free slabs is whole, while there still are some to work with."""
        self.can_narrow = any(running.request.min_kv_precision is not None for running in self._running)
        if not self.can_narrow:
            return
        kv, reserve = self._kv, self._kv.reserve_slabs
        # Where pages are only waiting to be moved together, the reserve is whole again a step or two later.
        while kv.num_free_slabs < reserve and not kv.is_compacting and self.narrow(None):
            kv.make_room({}, reserve, patient=True)

    def narrow(self, shares: frozenset[str] | None) -> bool:
        """Narrow some pages of one request; whether any could be.

        All requests are narrowed by one format before any is by the next; the latest admitted goes first.

        Args:
            shares: names of the memory shares that are short; None: any.
        """
        candidates = []
        for running in reversed(self._running):
            if not self._may_narrow(running, shares):
                continue
            what = self._kv.next_requantization(running.request, PAGES_AT_A_TIME, self._config.narrow_keep_pages)
            if what is not None:
                candidates.append((running.request, what))
        candidates.sort(key=lambda candidate: -self._bits(candidate[1].source))
        for request, what in candidates:
            if self._kv.requantize_pages(request, what):
                self._quotas.note(request)
                return True
        return False

    def most_units(self, shares: frozenset[str]) -> int:
        """Units that narrowing as far as allowed would free, those of pages that others share too."""
        total = 0
        for running in self._running:
            if self._may_narrow(running, shares):
                total += self._kv.most_narrowed_units(running.request, self._config.narrow_keep_pages)
        return total

    def _may_narrow(self, running: RunningRequest, shares: frozenset[str] | None) -> bool:
        """Whether the request allows it, takes memory from these shares, and is not under a guarantee."""
        if running.request.min_kv_precision is None or (shares is not None and running.shares.isdisjoint(shares)):
            return False
        return self._quotas.is_preemptible(running.request)

    def _bits(self, page_class: PageClass) -> float:
        return self._profiles[page_class.model].model.formats[page_class.precision].bits
