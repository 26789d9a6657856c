"""How many prefill tokens ride along in a step, and whose.

pages of a prompt   |----|----|----|----|--|        page_size 4, 18 tokens
chunks              |=========|====|====|==|        each begins at a page and ends at one, or at the last token
"""

import bisect
import math
from collections.abc import Iterable, Sequence

from fineserve_jax.request.request import Request, ScheduledChunk
from fineserve_jax.scheduler.costs import StepCost, step_cost
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig


class ChunkSizes:
    """Fills one step with prefill chunks.

    A target that the decodes alone miss cannot be kept by holding prefill back; then the least chunk still
    goes along, so that prompts advance. A target that they keep is kept, if need be by no prefill in this
    step.

    Args:
        config: page size, most tokens, and whether prompts are divided.
        profile: predicts the step's time.
        decodes: what else the step computes.
        target_s: seconds that the step may take; inf: no limit.
    """

    def __init__(
        self, config: SchedulerConfig, profile: StepProfile, decodes: Sequence[ScheduledChunk], target_s: float
    ) -> None:
        self._config = config
        self._profile = profile
        self._target_s = target_s
        self._cost = step_cost(decodes, profile.model.formats)
        self._out_of_reach = target_s < math.inf and profile.predict(self._cost) > target_s
        self._room = config.max_chunk_tokens
        self._chunks: list[ScheduledChunk] = []

    def fill(self, requests: Iterable[Request]) -> list[ScheduledChunk]:
        """Chunks for the first of `requests`, in their order, each after the first only if those before it
        end."""
        for request in requests:
            count = self._count(request)
            if not count:
                break
            self._add(_chunk(request, count))
            if count < request.num_uncomputed_tokens or self._room <= 0:
                break
        return self._chunks

    def _add(self, chunk: ScheduledChunk) -> None:
        self._chunks.append(chunk)
        self._cost = self._cost_with(chunk)
        self._room -= -(-chunk.num_slots // self._config.page_size) * self._config.page_size

    def _count(self, request: Request) -> int:
        """Tokens of `request` to compute in this step; 0 for none."""
        remaining, page_size = request.num_uncomputed_tokens, self._config.page_size
        if not self._config.chunked_prefill:
            fits = remaining <= self._room or not self._chunks
            return remaining if fits and (self._in_time(request, remaining) or self._must_go) else 0
        if request.branches:
            if _chunk(request, remaining).num_slots <= self._room and (
                self._in_time(request, remaining) or (self._must_go and remaining <= page_size)
            ):
                return remaining
            remaining = (remaining - 1) // page_size * page_size  # the prompt's end waits for a step with room for all
        most = min(remaining, self._room)
        if self._in_time(request, most):
            return most
        pages = bisect.bisect_left(
            range(1, most // page_size + 1), True, key=lambda n: not self._in_time(request, n * page_size)
        )
        if pages == 0 and self._must_go:
            return min(most, page_size)
        return pages * page_size

    @property
    def _must_go(self) -> bool:
        return self._out_of_reach and not self._chunks

    def _in_time(self, request: Request, count: int) -> bool:
        if self._target_s == math.inf:
            return True
        return self._profile.predict(self._cost_with(_chunk(request, count))) <= self._target_s

    def _cost_with(self, chunk: ScheduledChunk) -> StepCost:
        return self._cost + step_cost((chunk,), self._profile.model.formats)


def _chunk(request: Request, count: int) -> ScheduledChunk:
    """The next `count` tokens of a request, with its branches if these end its prompt."""
    branches = request.branches if count == request.num_uncomputed_tokens else ()
    return ScheduledChunk(request, request.num_computed_tokens, count, branches=branches)
