"""What is done when memory is short, after pages that nobody holds are evicted: narrow, and then preempt.

Narrowing encodes older pages of requests that allow it (`min_kv_precision`) in a narrower format; the latest admitted
request goes first. A request that is preempted loses its pages, and is computed again later or, where that is cheaper
and host memory has room, copied back from there.
"""

from collections.abc import Callable

from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request import Request
from fineserve_jax.scheduler.costs import StepCost
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.rows import Row
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

PAGES_AT_A_TIME = 32
ASSUMED_BYTES_PER_S = 4e9
"""Rate of copies between device and host memory before one was timed."""


class Pressure:
    """Relieves a KV manager that is short of memory.

    Args:
        config: newest pages to keep wide, and how to preempt.
        kv: whose pages.
        rows: the admitted requests in the order of admission; the scheduler's, read only here.
        profiles: predict what computing a request again takes.

    Attributes:
        can_narrow: whether any row allowed narrowing when the step began.
        transfer_bytes_per_s: measured rate of copies between device and host memory.
        may_narrow: whether a row's pages may be narrowed for others; told by quotas.
        on_narrowing: told of each request whose pages were.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        rows: dict[Request, Row],
        profiles: dict[str, StepProfile],
    ) -> None:
        self._config, self._kv, self._rows, self._profiles = config, kv, rows, profiles
        self.can_narrow = False
        self.transfer_bytes_per_s = ASSUMED_BYTES_PER_S
        self.may_narrow: Callable[[Row], bool] = lambda row: True
        self.on_narrowing: Callable[[Request], None] = lambda request: None

    def note_rate(self, bytes_per_s: float | None) -> None:
        """The measured rate of copies between device and host memory, if there is one yet."""
        self.transfer_bytes_per_s = bytes_per_s or self.transfer_bytes_per_s

    def begin_step(self) -> None:
        """Narrow pages until the reserve of free slabs is whole, while there still are some to work with."""
        self.can_narrow = any(request.min_kv_precision is not None for request in self._rows)
        if not self.can_narrow:
            return
        reserve = self._kv.reserve_slabs
        # Where pages are only waiting to be moved together, the reserve is whole again a step or two later.
        while self._kv.num_free_slabs < reserve and not self._kv.is_compacting and self.narrow(None):
            self._kv.make_room({}, reserve, patient=True)

    def narrow(self, shares: frozenset[str] | None) -> bool:
        """Narrow some pages of one request; whether any could be.

        All requests are narrowed by one step before any is by the next; the latest admitted goes first.

        Args:
            shares: names of the memory shares that are short; None: any.
        """
        candidates = []
        for row in reversed(self._rows.values()):
            if row.request.min_kv_precision is None or (shares is not None and row.shares.isdisjoint(shares)):
                continue
            if not self.may_narrow(row):
                continue
            what = self._kv.next_requantization(row.request, PAGES_AT_A_TIME, self._config.narrow_keep_pages)
            if what is not None:
                candidates.append((row.request, what))
        candidates.sort(key=lambda candidate: -self._bits(candidate[1].source))
        for request, what in candidates:
            if self._kv.requantize_pages(request, what):
                self.on_narrowing(request)
                return True
        return False

    def most_units(self, shares: frozenset[str]) -> int:
        """Units that narrowing as far as allowed would free, those of pages that others share too."""
        total = 0
        for row in self._rows.values():
            request = row.request
            if request.min_kv_precision is None or row.shares.isdisjoint(shares) or not self.may_narrow(row):
                continue
            held = self._kv.holds(request)
            floor = self._kv.class_of(request.model, request.min_kv_precision).page_units
            stop = request.num_computed_tokens // held.page_class.page_size - self._config.narrow_keep_pages
            for run in held.parts(0, stop):
                total += max(0, run.page_class.page_units - floor) * len(run.handles)
        return total

    def _bits(self, page_class: PageClass) -> float:
        return self._profiles[page_class.model].model.formats[page_class.kv_format].bits

    def release(self, row: Row) -> None:
        """Take a preempted row's pages, and save what they hold if that pays."""
        request = row.request
        if self._saves(request):
            self._kv.save(request)
        else:
            self._kv.release(request)
            request.num_computed_tokens = 0

    def _saves(self, request: Request) -> bool:
        if self._config.preemption == "recompute" or not request.num_computed_tokens:
            return False
        if not self._kv.can_save(request):
            return False
        if self._config.preemption == "swap":
            return True
        both_ways_s = 2 * self._kv.save_bytes(request) / self.transfer_bytes_per_s
        return both_ways_s < self._recompute_s(request)

    def _recompute_s(self, request: Request) -> float:
        """Predicted time of computing a request's tokens again in chunks."""
        profile, chunk = self._profiles[request.model], self._config.max_chunk_tokens
        seconds = 0.0
        for start in range(0, request.num_computed_tokens, chunk):
            count = min(chunk, request.num_computed_tokens - start)
            pairs = count * start + count * (count + 1) // 2
            kv_bytes = start * profile.model.formats[request.kv_precision].bytes_per_token
            seconds += profile.predict(StepCost(count, pairs, kv_bytes, start))
        return seconds
