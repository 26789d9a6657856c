"""Whose step is next, where several models share the device: a step computes requests of one."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

from fineserve_jax.scheduler.costs import StepCost
from fineserve_jax.scheduler.execution import due_s
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.running_request import RunningRequest

FAR_BEHIND = 10
"""Tokens by which a request is behind when its target no longer hurries its model."""

MOST_TURNS_LEFT_OUT = 16
"""Steps of other models after which one that has requests is due, whatever its targets."""


class ModelChoice:
    """Chooses the model of each step.

    Args:
        profiles: by model, predict step times; the scheduler's, where models and learnt profiles come and go.
        slo_aware: whether targets count; if not, models take turns.
    """

    def __init__(self, profiles: Mapping[str, StepProfile], slo_aware: bool) -> None:
        self._profiles, self._slo_aware = profiles, slo_aware
        self._last_turns: Counter[str] = Counter()  # those that were never next count as 0
        self._num_turns = 0

    def next(self, requests: Iterable[RunningRequest], now: float) -> str:
        """Whose step is next; there must be running requests. In this order

        - a model that was left out for `MOST_TURNS_LEFT_OUT` steps, or one with a request that would miss its target if
          another model's step came first: whichever is due first;
        - one with prompts to compute, since the requests it gains make its steps worth more: the longest left out;
        - the one whose step gives the most tokens a second. A step reads the weights however few its requests, so that
          a model with few of them should run as seldom as its targets allow.
        """
        model = self._choose(requests, now)
        self._num_turns += 1
        self._last_turns[model] = self._num_turns
        return model

    def _choose(self, requests: Iterable[RunningRequest], now: float) -> str:
        if len(self._profiles) == 1:
            return next(iter(self._profiles))
        if not self._slo_aware:
            return min({running.request.model: None for running in requests}, key=self._last_turns.__getitem__)
        loads = _by_model(requests, self._profiles, now)
        if len(loads) == 1:
            return next(iter(loads))
        seconds = {name: self._profiles[name].predict(load.decode_cost()) for name, load in loads.items()}
        due = self._due(loads, seconds, now)
        if due:
            return min(due, key=lambda name: (due[name], self._last_turns[name]))
        prefilling = [name for name, load in loads.items() if load.has_prefill]
        if prefilling:
            return min(prefilling, key=self._last_turns.__getitem__)
        return max(loads, key=lambda name: (loads[name].num_decodes / seconds[name], -self._last_turns[name]))

    def _due(self, loads: Mapping[str, "_ModelLoad"], seconds: Mapping[str, float], now: float) -> dict[str, float]:
        """When the step of each model has to start that cannot wait for another's."""
        longest_s = max(seconds.values())
        due = {}
        for name, load in loads.items():
            start_s = load.due_s - seconds[name]
            if self._num_turns - self._last_turns[name] >= MOST_TURNS_LEFT_OUT:
                start_s = min(start_s, now)
            if start_s < now + longest_s:
                due[name] = start_s
        return due


class _ModelLoad:
    """What the choice looks at of a model: how many requests decode, what they read, and when the first is due."""

    __slots__ = ("due_s", "formats", "has_prefill", "kv_bytes", "kv_tokens", "num_decodes")

    def __init__(self, profile: StepProfile) -> None:
        self.formats = profile.model.formats
        self.due_s, self.has_prefill, self.num_decodes = math.inf, False, 0
        self.kv_bytes, self.kv_tokens = 0.0, 0

    def decode_cost(self) -> StepCost:
        return StepCost(self.num_decodes, 0, self.kv_bytes, self.kv_tokens)


def _by_model(
    requests: Iterable[RunningRequest], profiles: Mapping[str, StepProfile], now: float
) -> dict[str, _ModelLoad]:
    """The load of each model that has requests, in one loop that is run for every request and step."""
    loads: dict[str, _ModelLoad] = {}
    for running in requests:
        request = running.request
        load = loads.get(request.model)
        if load is None:
            load = loads[request.model] = _ModelLoad(profiles[request.model])
        computed = request.num_computed_tokens
        load.kv_tokens += computed
        load.kv_bytes += computed * load.formats[request.kv_precision].bytes_per_token
        if len(request.token_ids) - computed > 1:
            load.has_prefill = True
            continue
        load.num_decodes += 1
        tpot_slo_s = request.options.tpot_slo_s
        if tpot_slo_s is not None:
            due = due_s(request, tpot_slo_s, now)
            # One that is far behind has missed its target: it is computed, but makes no step urgent.
            if load.due_s > due > now - FAR_BEHIND * tpot_slo_s:
                load.due_s = due
    return loads
