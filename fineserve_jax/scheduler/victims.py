"""Who gives way when memory is short: the least urgent of those that compete for it (the largest priority number), and
of one priority the latest admitted.

A request that quotas guarantee its memory is spared for as long as others can give way.
"""

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.running_request import RunningRequest


class Victims:
    """Chooses which running request is preempted.

    Args:
        kv: whose memory it is.
        running: the admitted requests.
        quotas: who is preemptible, and who may have no more.
    """

    def __init__(self, kv: KVManager, running: RunningRequests, quotas: Quotas) -> None:
        self._kv, self._running, self._quotas = kv, running, quotas

    def over_quota(self, growing: RunningRequest) -> RunningRequest | None:
        """Who has to give way so that a request can grow to its known tokens within its maxima: one of the quota,
        perhaps itself; None if it can grow."""
        name = self._quotas.exceeded_by_growth(growing.request)
        if name is None:
            return None
        running = self._running.least_urgent_first()
        return next(other for other in running if self._quotas.counts_against(other.request, name))

    def for_guarantee(self, joining: RunningRequest) -> RunningRequest | None:
        """Who gives way to a request under a guarantee that finds no memory or no batch slot; None if nobody can."""
        for other in self._running.least_urgent_first():
            if self._is_preemptible(other) and other.competes_with(joining):
                return other
        return None

    def for_growth(self, growing: RunningRequest) -> RunningRequest:
        """Who gives up its pages so that a request can grow: one that is less urgent or was admitted after it, of its
        own page class if there is one, since those pages are of use at once; the request itself if there is none.

        Requests that quotas guarantee their memory are spared if others can give way. If `growing` is one of them,
        even those before it give way.
        """
        competing = [
            other for other in self._running.least_urgent_first() if other is growing or other.competes_with(growing)
        ]
        if len(competing) == 1 and not self._kv.holds(growing.request).exact:
            return growing  # narrowed, its pages take slabs of several formats; computed again, they are in one
        if len(competing) == 1:
            raise RuntimeError(
                f"request {growing.request.request_id} cannot grow to {growing.request.num_tokens} tokens although "
                "no other competes for its memory; the engine must refuse requests that do not fit alone "
                "(KVManager.fits_alone)"
            )
        behind = competing[: competing.index(growing)]
        candidates = [other for other in behind if self._is_preemptible(other)]
        if not candidates and not self._is_preemptible(growing):
            candidates = [other for other in competing if self._is_preemptible(other)] or behind
        return self._of_own_class(candidates, growing) if candidates else growing

    def _of_own_class(self, candidates: list[RunningRequest], growing: RunningRequest) -> RunningRequest:
        """The first of `growing`'s page class among the least urgent candidates; without one, the first."""
        priority = self._running.priority_of(candidates[0])
        least_urgent = (other for other in candidates if self._running.priority_of(other) == priority)
        own_class = (other for other in least_urgent if other.page_class is growing.page_class)
        return next(own_class, candidates[0])

    def _is_preemptible(self, running: RunningRequest) -> bool:
        return self._quotas.is_preemptible(running.request)
