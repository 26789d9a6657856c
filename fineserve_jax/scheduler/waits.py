"""How long a request that comes now would wait for memory, predicted from what is ahead of it.

Requests take places, as many as hold memory while others wait for it, or else as many as a batch may have. Each keeps
its place for the decode steps of the output that is expected of it; whoever waits takes the first place that is free,
in order; and while a prompt is computed, all decoding stands still. That is a queue with several servers, first come
first served, whose service times are known, and is played through.
"""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fineserve_jax.request.request import Request, RequestStatus
from fineserve_jax.scheduler.costs import StepCost
from fineserve_jax.scheduler.lengths import OutputLengths
from fineserve_jax.scheduler.profile import StepProfile


class Ahead(NamedTuple):
    """A request that is there already.

    Attributes:
        has_place: it holds memory.
        prefill_tokens: still to be computed before it can be sampled; 0 or 1 while it decodes.
        cached_tokens: computed already.
        output_tokens: expected of it from now on.
    """

    model: str
    has_place: bool
    prefill_tokens: int
    cached_tokens: int
    output_tokens: float


class WaitPredictor:
    """Predicts with what the scheduler has learnt. May be called by any thread.

    Args:
        places: most requests that hold memory.
        profiles: step times, by model.
        lengths: of outputs.
    """

    def __init__(self, places: int, profiles: Mapping[str, StepProfile], lengths: OutputLengths) -> None:
        self._places, self._profiles, self._lengths = places, profiles, lengths

    def ahead(self, request: Request) -> Ahead:
        """A request that the engine has and that has not ended."""
        has_place = request.status is not RequestStatus.WAITING
        computed = request.num_computed_tokens
        left = self._lengths.expected(request) - request.num_output_tokens
        return Ahead(request.model, has_place, request.num_tokens - computed, computed, max(left, 1.0))

    def newcomer(self, model: str, tenant: str, prompt_tokens: int, most_output_tokens: int) -> Ahead:
        """A request that the engine has yet to take."""
        return Ahead(model, False, prompt_tokens, 0, self._lengths.of_tenant(tenant, most_output_tokens))

    def places(self, ahead: Sequence[Ahead], is_short: bool) -> int:
        """How many requests can hold memory at once: those that do, if others wait in vain.

        Args:
            ahead: those that are there.
            is_short: see `Scheduler.is_short`.
        """
        return max(sum(one.has_place for one in ahead), 1) if is_short else self._places

    def wait_s(self, ahead: Sequence[Ahead], is_short: bool) -> float:
        """Seconds until a request behind all of these has memory; 0 if it has it with the next step.

        Args:
            ahead: those that wait in the order in which they will be admitted.
            is_short: see `Scheduler.is_short`.
        """
        ahead = [one for one in ahead if one.model in self._profiles]  # others were unloaded meanwhile
        places = self.places(ahead, is_short)
        if len(ahead) < places:
            return 0.0
        running, waiting = [one for one in ahead if one.has_place], [one for one in ahead if not one.has_place]
        step_s = self._step_s([*running, *waiting][:places])
        prefill_s = sum(map(self._prefill_s, running))
        free_at = [0.0] * max(0, places - len(running)) + [one.output_tokens * step_s for one in running]
        heapq.heapify(free_at)
        for one in waiting:
            prefill_s += self._prefill_s(one)
            heapq.heapreplace(free_at, free_at[0] + one.output_tokens * step_s)
        return free_at[0] + prefill_s

    def first_token_s(self, ahead: Sequence[Ahead], one: Ahead, is_short: bool) -> tuple[float, float]:
        """Seconds until the first token of a request behind all of these, and those of a decode step with it.

        Args:
            ahead, is_short: see `wait_s`.
            one: the request, of a model that is served.
        """
        ahead = [other for other in ahead if other.model in self._profiles]
        places = self.places(ahead, is_short)
        wait_s = self.wait_s(ahead, is_short)
        prompts_s = 0.0 if len(ahead) >= places else sum(map(self._prefill_s, ahead))  # else they are in the wait
        together = [other for other in ahead if other.has_place][: places - 1]
        return wait_s + prompts_s + self._prefill_s(one), self._step_s([*together, one])

    def _prefill_s(self, one: Ahead) -> float:
        """Seconds until its first token, were its prompt computed at once."""
        tokens = one.prefill_tokens
        if tokens <= 1:
            return 0.0
        pairs = tokens * one.cached_tokens + tokens * (tokens + 1) // 2
        return self._profiles[one.model].predict(StepCost(tokens, pairs, 0.0))

    def _step_s(self, together: Iterable[Ahead]) -> float:
        """Seconds of a decode step of these; those of several models take turns."""
        rows: dict[str, list[int]] = {}
        for one in together:
            rows.setdefault(one.model, []).append(one.cached_tokens + one.prefill_tokens)
        return sum(self._decode_s(model, cached) for model, cached in rows.items())

    def _decode_s(self, model: str, cached: Sequence[int]) -> float:
        profile, tokens = self._profiles[model], sum(cached)
        widest = max(cost.bytes_per_token for cost in profile.model.formats.values())
        return profile.predict(StepCost(len(cached), 0, tokens * widest, tokens))
