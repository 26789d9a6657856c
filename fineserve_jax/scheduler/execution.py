"""Level 2: what of the admitted rows runs in the next step.

Every row whose prompt is computed decodes. Decoding is bound by bandwidth, so prefill chunks ride along: as
many tokens as the profile says fit under the tightest time-per-token target among the decoding rows, or
without a target as many as `max_chunk_tokens`, which gives the most tokens a second.

A target is for a row's tokens on average, so what counts is when the next one is *due*: as long after the first as
the target allows to the tokens between. A row that is ahead lends its time to prefill; one that is behind asks for
steps that are shorter than its target until it has caught up.

    pages of a prompt   |----|----|----|----|--|        page_size 4, 18 tokens
    chunks              |=========|====|====|==|        each begins at a page and ends at one, or at the last token
"""

import bisect
import math
from collections.abc import Iterable, Mapping, Sequence

from fineserve_jax.request import Request, ScheduledChunk, SchedulerOutput
from fineserve_jax.scheduler.costs import StepCost, step_cost
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.rows import Row
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig

CATCHING_UP = 0.75
"""Seconds of a step, of a row's target, for one that is behind."""

FAR_BEHIND = 10
"""Tokens by which a row is behind when its target no longer hurries its model."""

MOST_TURNS_LEFT_OUT = 16
"""Steps of other models after which one that has rows is due, whatever its targets."""


def plan_step(rows: Iterable[Row], config: SchedulerConfig, profile: StepProfile, now: float) -> SchedulerOutput:
    """The next step of one model.

    Args:
        rows: its admitted rows, in the order of admission; those that decode have grown already.
        config: chunk rules.
        profile: predicts the model's step time.
        now: when the step begins.
    """
    decodes: list[ScheduledChunk] = []
    prefilling: list[Row] = []
    for row in rows:
        request = row.request
        computed = request.num_computed_tokens
        if len(request.token_ids) - computed > 1:
            prefilling.append(row)
        else:
            decodes.append(ScheduledChunk(request, computed, 1))
    if not prefilling:
        return SchedulerOutput(tuple(decodes), ())
    target_s = _time_for_step(decodes, now) if config.slo_aware else math.inf
    prefilling.sort(key=lambda row: (row.walk, row.key, row.request.num_uncomputed_tokens, row.request.sequence))
    chunks = _ChunkPicker(config, profile, decodes, target_s).pick([row.request for row in prefilling])
    return SchedulerOutput(tuple(decodes), tuple(chunks))


def _time_for_step(decodes: Iterable[ScheduledChunk], now: float) -> float:
    """How long the next step may take for the decoding rows; written out, as it is run for each row of a step."""
    shortest_s = math.inf
    for scheduled in decodes:
        request = scheduled.request
        tpot_slo_s = request.tpot_slo_s
        if tpot_slo_s is None:
            continue
        least_s = CATCHING_UP * tpot_slo_s
        if least_s < shortest_s:
            shortest_s = min(shortest_s, max(_due_s(request, tpot_slo_s, now) - now, least_s))
    return shortest_s


def _due_s(request: Request, tpot_slo_s: float, now: float) -> float:
    """When the row's next token is due."""
    first = request.times.first_token_s
    return (
        now + tpot_slo_s if first is None else first + tpot_slo_s * (len(request.token_ids) - request.num_prompt_tokens)
    )


class _ModelRows:
    """What the choice between models looks at: how many rows, what they read, and when the first is due."""

    __slots__ = ("due_s", "formats", "has_prefill", "kv_bytes", "kv_tokens", "num_decodes")

    def __init__(self, profile: StepProfile) -> None:
        self.formats = profile.model.formats
        self.due_s, self.has_prefill, self.num_decodes = math.inf, False, 0
        self.kv_bytes, self.kv_tokens = 0.0, 0

    def decode_cost(self) -> StepCost:
        return StepCost(self.num_decodes, 0, self.kv_bytes, self.kv_tokens)


def _by_model(rows: Iterable[Row], profiles: Mapping[str, StepProfile], now: float) -> dict[str, _ModelRows]:
    """Rows by model, in one loop that is run for every row and step."""
    models: dict[str, _ModelRows] = {}
    for row in rows:
        request = row.request
        of_model = models.get(request.model)
        if of_model is None:
            of_model = models[request.model] = _ModelRows(profiles[request.model])
        computed = request.num_computed_tokens
        of_model.kv_tokens += computed
        of_model.kv_bytes += computed * of_model.formats[request.kv_precision].bytes_per_token
        if len(request.token_ids) - computed > 1:
            of_model.has_prefill = True
            continue
        of_model.num_decodes += 1
        tpot_slo_s = request.tpot_slo_s
        if tpot_slo_s is not None:
            due_s = _due_s(request, tpot_slo_s, now)
            # One that is far behind has missed its target: it goes along, but hurries nobody.
            if of_model.due_s > due_s > now - FAR_BEHIND * tpot_slo_s:
                of_model.due_s = due_s
    return models


def next_model(
    rows: Iterable[Row], profiles: Mapping[str, StepProfile], last_turns: Mapping[str, int], turn: int, now: float
) -> str:
    """Whose step is next, of several models: in this order

    - one that was left out for `MOST_TURNS_LEFT_OUT` steps, or one with a row that would be late if another
      model's step came first: whichever is due first;
    - one with prompts to compute, since the rows it gains make its steps worth more: the longest left out;
    - the one whose step gives the most tokens a second. A step reads the weights however few its rows, so that a
      model with few of them should run as seldom as its targets allow.
    """
    models = _by_model(rows, profiles, now)
    if len(models) == 1:
        return next(iter(models))
    seconds = {name: profiles[name].predict(of_model.decode_cost()) for name, of_model in models.items()}
    longest_s = max(seconds.values())
    due = {}
    for name, of_model in models.items():
        start_s = of_model.due_s - seconds[name]
        if turn - last_turns[name] >= MOST_TURNS_LEFT_OUT:
            start_s = min(start_s, now)
        if start_s < now + longest_s:
            due[name] = start_s
    if due:
        return min(due, key=lambda name: (due[name], last_turns[name]))
    prefilling = [name for name, of_model in models.items() if of_model.has_prefill]
    if prefilling:
        return min(prefilling, key=last_turns.__getitem__)
    return max(models, key=lambda name: (models[name].num_decodes / seconds[name], -last_turns[name]))


class _ChunkPicker:
    """Fills one step with prefill chunks.

    A target that the decodes alone miss cannot be kept by holding prefill back; then the least chunk still
    goes along, so that prompts get on. A target that they keep is kept, if need be by no prefill in this
    step.
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

    def pick(self, requests: Iterable[Request]) -> list[ScheduledChunk]:
        """Chunks for the first of `requests`, in their order, each after the first only if those before it
        end."""
        for request in requests:
            count = self._count(request)
            if not count:
                break
            self._take(ScheduledChunk(request, request.num_computed_tokens, count))
            if count < request.num_uncomputed_tokens or self._room <= 0:
                break
        return self._chunks

    def _take(self, chunk: ScheduledChunk) -> None:
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
        chunk = ScheduledChunk(request, request.num_computed_tokens, count)
        return self._profile.predict(self._cost_with(chunk)) <= self._target_s

    def _cost_with(self, chunk: ScheduledChunk) -> StepCost:
        return self._cost + step_cost((chunk,), self._profile.model.formats)
