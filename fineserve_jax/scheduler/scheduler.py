"""The scheduler: what the engine asks for its next step, and tells the outcome.

    plan = scheduler.schedule(now)               # room for the decoding rows, level 1, level 2
    sampled = runner.execute(plan)
    for request in scheduler.commit(plan, sampled, now):
        if it is done: scheduler.finish(request, reason, now)

It decides when a token is computed, never which token comes out.
"""

import math
from collections.abc import Mapping, Sequence

from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request import FinishReason, Request, RequestStatus, SchedulerOutput
from fineserve_jax.scheduler.admission import Admission
from fineserve_jax.scheduler.costs import ModelCost, StepCost, step_cost
from fineserve_jax.scheduler.devices import DeviceRoofline
from fineserve_jax.scheduler.execution import next_model, plan_step
from fineserve_jax.scheduler.growth import Growth
from fineserve_jax.scheduler.lengths import OutputLengths
from fineserve_jax.scheduler.policies import find_policy, policy_context
from fineserve_jax.scheduler.pressure import Pressure
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.rows import GrowthReserve, Row
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig
from fineserve_jax.scheduler.waiting import ON_TIME, WaitingQueue, model_and_format, model_format_and_tenant


class Scheduler:
    """Both levels over one arena. Deterministic: the same calls give the same plans.

    Args:
        config: settings of both levels.
        kv: host half of the KV cache; the scheduler alone grows and releases requests in it.
        models: cost of each model served, by name.
        roofline: the device, where step times are predicted from at first.

    Attributes:
        profiles: each model's step-time profile.
        pressure: what is done when memory is short.
        quotas: who may have how much of it.
        num_preemptions: how often a request lost its pages since the start.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        models: Mapping[str, ModelCost],
        roofline: DeviceRoofline,
    ) -> None:
        policy, lengths = find_policy(config.policy), OutputLengths()
        context = policy_context(config.ageing_s, models, lengths.expected, self._prefill_s, config.tenant_weights)
        self.config = config
        self.profiles = {name: StepProfile(cost, roofline) for name, cost in models.items()}
        self._lengths, self._shares = lengths, context.shares
        self.num_preemptions = 0
        self._kv = kv
        self._requests: dict[str, Request] = {}
        self._rows: dict[Request, Row] = {}  # in the order of admission
        self._queue = WaitingQueue(
            lambda request: policy(request, context),
            self._latest_start_s,
            config.overtaking_limit_s,
            model_format_and_tenant if config.quotas else model_and_format,
        )
        self._reserve = GrowthReserve(config.growth_reserve_pages)
        self.pressure = Pressure(config, kv, self._rows, self.profiles)
        self.quotas = Quotas(kv, config.quotas, self._rows, config.growth_reserve_pages, self._preempt)
        self.pressure.may_narrow, self.pressure.on_narrowing = self.quotas.may_give_way, self.quotas.note
        self._growth = Growth(kv, self._rows, self._reserve, self.pressure, self.quotas, self._preempt)
        self._admission = Admission(config, kv, self._queue, self._reserve, self.pressure, self.quotas)
        self._dropped: list[Request] = []
        self._walk_may_help = False  # since the last walk a request came, or something was freed or can be narrowed
        self._last_turns: dict[str, int] = dict.fromkeys(models, 0)
        self._num_steps = 0

    def start_from(self, profiles: Mapping[str, StepProfile]) -> None:
        """Predict from profiles that were learnt before; models that are not among them are learnt anew.

        Raises:
            ConfigError: a profile of a model with other sizes.
        """
        for name in self.profiles.keys() & profiles.keys():
            if profiles[name].model != self.profiles[name].model:
                raise ConfigError(
                    f"the step profile of {name!r} was learnt with other weights or KV formats; use another file"
                )
            self.profiles[name] = profiles[name]

    # -- requests come and go --------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests that hold memory, READY or RUNNING."""
        return len(self._rows)

    @property
    def is_settled(self) -> bool:
        """Whether a walk would admit nobody: since the last one no request came, and nothing was freed or can be
        narrowed."""
        return not (self._walk_may_help and self._queue)

    def add(self, request: Request) -> None:
        """Let a request wait. The engine has made sure that it fits alone at `max_total_tokens`.

        Raises:
            RequestError: an id that is in use, or more tokens than a quota allows.
            ConfigError: a model or KV format that is not served.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is in use; give each request its own")
        if request.kv_precision not in self._profile(request.model).model.formats:
            known = ", ".join(self._profile(request.model).model.formats)
            raise ConfigError(f"kv_precision={request.kv_precision!r} is not served by {request.model}; use {known}")
        self.quotas.check(request.model, request.kv_precision, request.tenant, request.max_total_tokens)
        self._requests[request.request_id] = request
        self._wait(request)

    def abort(self, request_id: str, now: float | None = None) -> Request | None:
        """End a request wherever it is; None if it is not known (any more)."""
        request = self._requests.get(request_id)
        if request is not None:
            self.finish(request, FinishReason.ABORT, now)
        return request

    def finish(self, request: Request, reason: FinishReason, now: float | None) -> None:
        """End a request and free what it holds."""
        del self._requests[request.request_id]
        if (row := self._rows.pop(request, None)) is not None:
            self._reserve.remove(row)
        else:
            self._queue.remove(request)
        if reason in (FinishReason.STOP, FinishReason.LENGTH):
            self._lengths.observe(request)
        self._kv.release(request)
        self.quotas.note(request)
        request.status, request.finish_reason = RequestStatus.FINISHED, reason
        request.times.finished_s, request.fork_of = now, None
        self._walk_may_help = True

    def take_dropped(self) -> list[Request]:
        """Requests that ended as LATE since the last call."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def _profile(self, model: str) -> StepProfile:
        try:
            return self.profiles[model]
        except KeyError:
            raise ConfigError(f"model={model!r} is not served; the models are: {', '.join(self.profiles)}") from None

    def _prefill_s(self, request: Request) -> float:
        """Predicted seconds until the request's first token, were all of it computed at once."""
        tokens = request.num_tokens
        return self.profiles[request.model].predict(StepCost(tokens, tokens * (tokens + 1) // 2, 0.0))

    def _latest_start_s(self, request: Request) -> float:
        """When the request has to be admitted to have its first token in time; never, if it has no target."""
        if request.ttft_slo_s is None or request.times.first_token_s is not None or not self.config.slo_aware:
            return math.inf
        return request.times.arrival_s + request.ttft_slo_s - self._prefill_s(request)

    def _wait(self, request: Request) -> None:
        request.status = RequestStatus.WAITING
        self._queue.push(request)
        self._walk_may_help = True

    # -- a step ----------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput | None:
        """The next step, of one model; None when there is no request to compute.

        When decoding rows have to be preempted to make room, nothing is admitted in the same call, unless none is left.
        """
        self._kv.begin_step()
        self.pressure.begin_step()
        preempted = self._growth.make_room()
        if self._walk_may_help and not (preempted and self._rows):
            self._admit(now)
            self._walk_may_help |= self._kv.is_compacting or self._admission.owes
        if not self._rows:
            return None
        return self._plan(self._next_model(now), now)

    def commit(self, plan: SchedulerOutput, sampled: Sequence[int], now: float) -> list[Request]:
        """Enter the outcome of a step.

        Args:
            plan: as `schedule` returned it.
            sampled: token for each of `plan.chunks`, in that order; the value is ignored where the chunk
                samples none, and where the request was aborted meanwhile.
            now: end of the step, engine clock.

        Returns:
            Requests that got a token, in the order of `plan.chunks`.
        """
        chunks = plan.chunks
        if len(sampled) != len(chunks):
            raise ValueError(f"{len(sampled)} sampled tokens for a step of {len(chunks)} chunks")
        advanced, note_computed, page_size = [], self._kv.note_computed, self.config.page_size
        for scheduled, token in zip(chunks, sampled, strict=True):
            request = scheduled.request
            if request.status is RequestStatus.FINISHED:
                continue
            request.num_computed_tokens = computed = scheduled.start + scheduled.count
            if scheduled.count > 1 or not computed % page_size:  # a page may be full
                note_computed(request)
                self._walk_may_help |= request.min_kv_precision is not None  # and be narrowed for who waits
            if computed == len(request.token_ids):
                request.token_ids.append(int(token))
                if request.times.first_token_s is None:
                    request.times.first_token_s = now
                advanced.append(request)
        return advanced

    def observe(self, plan: SchedulerOutput, seconds: float) -> None:
        """Learn from how long a step took on the device; leave out steps that compiled."""
        profile = self._profile(plan.chunks[0].request.model)
        profile.observe(step_cost(plan.chunks, profile.model.formats), seconds)

    def _admit(self, now: float) -> None:
        for request in self._queue.defer_late(now):
            if request.drop_when_late:
                self.finish(request, FinishReason.LATE, now)
                self._dropped.append(request)
        self._walk_may_help = False
        places = self.config.max_batch_size - len(self._rows)
        if not self._queue or (not places and not self.config.quotas):
            return
        for row in self._admission.walk(places, now):
            self._rows[row.request] = row
            row.request.status = RequestStatus.READY
            if self.config.policy == "tenants" and row.key[0] == ON_TIME:
                self._shares.admitted(row.key[1])
            if row.request.times.admitted_s is None:
                row.request.times.admitted_s = now
        if not self._rows:
            raise RuntimeError(
                f"none of {len(self._queue)} waiting requests fits although no other holds memory; the "
                "engine must refuse requests that do not fit alone (KVManager.fits_alone)"
            )

    def _next_model(self, now: float) -> str:
        """Whose step is next: see `execution.next_model`; models take turns if targets do not count."""
        if len(self.profiles) == 1:
            return next(iter(self.profiles))
        if self.config.slo_aware:
            return next_model(self._rows.values(), self.profiles, self._last_turns, self._num_steps, now)
        return min({row.request.model: None for row in self._rows.values()}, key=self._last_turns.__getitem__)

    def _plan(self, model: str, now: float) -> SchedulerOutput:
        rows = [row for row in self._rows.values() if row.request.model == model and self._kv.can_advance(row.request)]
        plan = plan_step(rows, self.config, self.profiles[model], now)
        self._num_steps += 1
        self._last_turns[model] = self._num_steps
        for scheduled in plan.chunks:
            scheduled.request.status = RequestStatus.RUNNING
        return plan

    def _preempt(self, row: Row) -> None:
        """Take a row's pages; its tokens stay."""
        request = row.request
        del self._rows[request]
        self._reserve.remove(row)
        self.pressure.release(row)
        self.quotas.note(request)
        request.num_preemptions += 1
        self.num_preemptions += 1
        self._wait(request)
