"""Memory for the requests that decode: each step some outgrow their pages, and if need be others give way to them."""

from collections.abc import Sequence

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.scheduler.narrowing_policy import NarrowingPolicy
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.running_request import RunningRequest
from fineserve_jax.scheduler.victims import Victims


class Growth:
    """Grows running requests.

    Args:
        kv: gives the pages.
        running: the admitted requests.
        narrowing: makes room by narrowing their pages.
        quotas: told of what they hold.
        victims: who gives way.
    """

    def __init__(
        self,
        kv: KVManager,
        running: RunningRequests,
        narrowing: NarrowingPolicy,
        quotas: Quotas,
        victims: Victims,
    ) -> None:
        self._kv, self._running, self._narrowing = kv, running, narrowing
        self._quotas, self._victims = quotas, victims

    def grow_all(self) -> bool:
        """Grow every request whose tokens have outgrown its pages, oldest admission first; whether any was preempted
        for it."""
        outgrown = self._outgrown()
        if self._grow_together(outgrown):
            return False
        before = self._running.num_preemptions
        for running in outgrown:
            if running in self._running:
                self._grow(running)
        return self._running.num_preemptions > before

    def grow_at_ease(self) -> bool:
        """`grow_all` where nobody gives way or is narrowed: False as soon as one would have to; those before it have
        grown."""
        outgrown = self._outgrown()
        return self._grow_together(outgrown) or all(self._grows_at_ease(running) for running in outgrown)

    def _outgrown(self) -> list[RunningRequest]:
        return [running for running in self._running if len(running.request.token_ids) > running.covered_tokens]

    def _grows_at_ease(self, growing: RunningRequest) -> bool:
        if self._victims.over_quota(growing) or self._kv.is_compacting:
            return False
        if not self._kv.grow(growing.request, growing.request.num_tokens, leaving={}):
            return False
        self._note(growing)
        return True

    def _grow_together(self, outgrown: Sequence[RunningRequest]) -> bool:
        """Grow all these requests at once, or none: where memory is short, or shares of it are to be kept, each has to
        ask for itself."""
        if self._narrowing.can_narrow or self._quotas.account is not None:
            return False
        if not self._kv.grow_together([running.request for running in outgrown]):
            return False
        for running in outgrown:
            running.note_growth()
            self._running.reserve.update(running)
        return True

    def _grow(self, growing: RunningRequest) -> None:
        """Grow a request to hold its known tokens, or preempt it when nobody can give way to it."""
        while (victim := self._victims.over_quota(growing)) or not self._has_room(growing):
            victim = victim or self._victims.for_growth(growing)
            self._running.preempt(victim)
            if victim is growing:
                return
        self._note(growing)

    def _note(self, grown: RunningRequest) -> None:
        self._quotas.note(grown.request)
        grown.note_growth()
        self._running.reserve.update(grown)

    def _has_room(self, growing: RunningRequest) -> bool:
        """Grow a request, narrowing others' pages as need be. While any can be, the reserve of free slabs is left
        alone: narrower pages have to go somewhere before those they were encoded from are free."""
        request, kv, narrowing = growing.request, self._kv, self._narrowing
        if narrowing.can_narrow:
            while not (kv.is_compacting or kv.grow(request, request.num_tokens, leaving={})):
                if not narrowing.narrow(growing.shares):
                    break
        while not kv.grow(request, request.num_tokens):
            if not (narrowing.can_narrow and narrowing.narrow(growing.shares)):
                return False
        return True
