"""Level 2: what of the admitted rows runs in the next step.

Every row whose prompt is computed decodes. Decoding is bound by bandwidth, so prefill chunks ride along: as
many tokens as the profile says fit under the tightest time-per-token target among the decoding rows, or
without a target as many as `max_chunk_tokens`, which gives the most tokens a second.

    pages of a prompt   |----|----|----|----|--|        page_size 4, 18 tokens
    chunks              |=========|====|====|==|        each begins at a page and ends at one, or at the last token
"""

import bisect
import math
from collections.abc import Iterable, Sequence

from fineserve_jax.request import Request, StepPlan, Work
from fineserve_jax.scheduler.config import SchedulerConfig
from fineserve_jax.scheduler.costs import StepCost, step_cost
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.rows import Row


def plan_step(rows: Iterable[Row], config: SchedulerConfig, profile: StepProfile) -> StepPlan:
    """The next step of one model.

    Args:
        rows: its admitted rows, in the order of admission; those that decode have grown already.
        config: chunk rules.
        profile: predicts the model's step time.
    """
    decodes: list[Work] = []
    prefilling: list[Row] = []
    target_s = math.inf
    for row in rows:
        request = row.request
        computed = request.num_computed_tokens
        if len(request.token_ids) - computed > 1:
            prefilling.append(row)
            continue
        decodes.append(Work(request, computed, 1))
        if request.tpot_slo_s is not None:
            target_s = min(target_s, request.tpot_slo_s)
    if not prefilling:
        return StepPlan(tuple(decodes), ())
    prefilling.sort(key=lambda row: (row.walk, row.key, row.request.num_uncomputed_tokens, row.request.sequence))
    chunks = _ChunkPicker(config, profile, decodes, target_s).pick([row.request for row in prefilling])
    return StepPlan(tuple(decodes), tuple(chunks))


class _ChunkPicker:
    """Fills one step with prefill chunks.

    A target that the decodes alone miss cannot be kept by holding prefill back; then the least chunk still
    goes along, so that prompts get on. A target that they keep is kept, if need be by no prefill in this
    step.
    """

    def __init__(self, config: SchedulerConfig, profile: StepProfile, decodes: Sequence[Work], target_s: float) -> None:
        self._config = config
        self._profile = profile
        self._target_s = target_s
        self._cost = step_cost(decodes, profile.model.formats)
        self._out_of_reach = target_s < math.inf and profile.predict(self._cost) > target_s
        self._room = config.max_chunk_tokens
        self._chunks: list[Work] = []

    def pick(self, requests: Iterable[Request]) -> list[Work]:
        """Chunks for the first of `requests`, in their order, each after the first only if those before it
        end."""
        for request in requests:
            count = self._count(request)
            if not count:
                break
            self._take(Work(request, request.num_computed_tokens, count))
            if count < request.num_uncomputed_tokens or self._room <= 0:
                break
        return self._chunks

    def _take(self, chunk: Work) -> None:
        self._chunks.append(chunk)
        self._cost = self._cost_with(chunk)
        self._room -= -(-chunk.count // self._config.page_size) * self._config.page_size

    def _count(self, request: Request) -> int:
        """Tokens of `request` to compute in this step; 0 for none."""
        remaining, page_size = request.num_uncomputed_tokens, self._config.page_size
        if not self._config.chunked_prefill:
            fits = remaining <= self._room or not self._chunks
            return remaining if fits and (self._in_time(request, remaining) or self._must_go) else 0
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
        chunk = Work(request, request.num_computed_tokens, count)
        return self._profile.predict(self._cost_with(chunk)) <= self._target_s

    def _cost_with(self, chunk: Work) -> StepCost:
        return self._cost + step_cost((chunk,), self._profile.model.formats)
