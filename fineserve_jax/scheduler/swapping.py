"""How preempted requests come back: computed again or, where that is cheaper and host memory has room, copied back."""

from collections.abc import Mapping

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import Request
from fineserve_jax.scheduler.costs import StepCost
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

ASSUMED_BYTES_PER_S = 4e9
"""Rate of copies between device and host memory before one was timed."""


class Swapping:
    """Takes the pages of preempted requests.

    Args:
        config: how to preempt, and how long chunks are.
        kv: whose pages.
        profiles: by model, predict what computing a request again takes.
    """

    def __init__(self, config: SchedulerConfig, kv: KVManager, profiles: Mapping[str, StepProfile]) -> None:
        self._config, self._kv, self._profiles = config, kv, profiles
        self._bytes_per_s = ASSUMED_BYTES_PER_S

    def note_rate(self, bytes_per_s: float | None) -> None:
        """The measured rate of copies between device and host memory; None: none was timed yet."""
        self._bytes_per_s = bytes_per_s or self._bytes_per_s

    def take_pages(self, request: Request) -> None:
        """Take all pages of a request, and save what they hold if that pays."""
        if self._saves(request):
            self._kv.save(request)
        else:
            self.drop_pages(request)

    def drop_pages(self, request: Request) -> None:
        """Take all pages of a request, whose tokens will be computed again."""
        self._kv.release(request)
        request.num_computed_tokens = 0

    def _saves(self, request: Request) -> bool:
        if self._config.preemption == "recompute" or not request.num_computed_tokens:
            return False
        if not self._kv.can_save(request):
            return False
        if self._config.preemption == "swap":
            return True
        both_ways_s = 2 * self._kv.save_bytes(request) / self._bytes_per_s
        return both_ways_s < self._recompute_s(request)

    def _recompute_s(self, request: Request) -> float:
        """Predicted seconds of computing a request's tokens again in chunks."""
        profile, chunk = self._profiles[request.model], self._config.max_chunk_tokens
        seconds = 0.0
        for start in range(0, request.num_computed_tokens, chunk):
            count = min(chunk, request.num_computed_tokens - start)
            pairs = count * start + count * (count + 1) // 2
            kv_bytes = start * profile.model.formats[request.kv_precision].bytes_per_token
            seconds += profile.predict(StepCost(count, pairs, kv_bytes, start))
        return seconds
