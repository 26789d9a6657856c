"""The scheduler: what the engine asks for its next step, and tells the outcome.

    output = scheduler.schedule(now)             # memory for the decoding requests, level 1, level 2
    sampled = runner.execute(output)
    for request in scheduler.commit(output, sampled, now):
        if it is done: scheduler.finish(request, reason, now)

It decides when a token is computed, never which token comes out.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import FinishReason, Request, RequestStatus, ScheduledChunk, SchedulerOutput
from fineserve_jax.scheduler.admission import Admission
from fineserve_jax.scheduler.costs import ModelCost, StepCost, step_cost
from fineserve_jax.scheduler.deadlines import Deadlines
from fineserve_jax.scheduler.devices import DeviceRoofline
from fineserve_jax.scheduler.execution import schedule_step
from fineserve_jax.scheduler.growth import Growth
from fineserve_jax.scheduler.lengths import OutputLengths
from fineserve_jax.scheduler.look_ahead import LookAhead, as_if_computed
from fineserve_jax.scheduler.model_choice import ModelChoice
from fineserve_jax.scheduler.narrowing_policy import NarrowingPolicy
from fineserve_jax.scheduler.policies import find_policy, policy_context
from fineserve_jax.scheduler.profile import StepProfile
from fineserve_jax.scheduler.quotas import Quotas
from fineserve_jax.scheduler.running import RunningRequests
from fineserve_jax.scheduler.running_request import RunningRequest
from fineserve_jax.scheduler.scheduler_config import SchedulerConfig
from fineserve_jax.scheduler.speculation import Speculation
from fineserve_jax.scheduler.swapping import Swapping
from fineserve_jax.scheduler.victims import Victims
from fineserve_jax.scheduler.waiting import ON_TIME, WaitingQueue, model_and_format, model_format_and_tenant
from fineserve_jax.scheduler.waits import WaitPredictor


class Scheduler:
    """Both levels over one arena. Deterministic: the same calls give the same steps.

    Args:
        config: settings of both levels.
        kv: host half of the KV cache; the scheduler alone grows and releases requests in it.
        models: cost of each model served, by name.
        roofline: the device, where step times are predicted from at first.
        speculation: gives decodes drafts; None: they have none.

    Attributes:
        profiles: each model's step-time profile.
        quotas: who may have how much of the memory.
        waits: how long who comes now would wait.
        row_limit: most requests that are to hold memory at once, where that is less than `max_batch_size`; None: that.
            It counts for those that are admitted from now on.
        speculation: counts drafts.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        kv: KVManager,
        models: Mapping[str, ModelCost],
        roofline: DeviceRoofline,
        speculation: Speculation | None = None,
    ) -> None:
        policy, lengths = find_policy(config.policy), OutputLengths()
        context = policy_context(config.ageing_s, models, lengths.expected, self._prefill_s, config.tenant_weights)
        self._policy_context = context
        self.config = config
        self.row_limit: int | None = None
        self.profiles = {name: StepProfile(cost, roofline) for name, cost in models.items()}
        self.speculation = speculation or Speculation()
        self._kv, self._roofline = kv, roofline
        self._lengths, self._tenant_shares = lengths, context.shares
        self.waits = WaitPredictor(config.max_batch_size, self.profiles, lengths)
        self._swapping = Swapping(config, kv, self.profiles)
        self._key_of = lambda request: policy(request, self._policy_context)
        self._begin(num_preemptions=0, num_reclaimed=0)

    def _begin(self, num_preemptions: int, num_reclaimed: int) -> None:
        """The books of requests, empty."""
        config, kv = self.config, self._kv
        self.quotas = quotas = Quotas(kv, config.quotas, config.growth_reserve_pages)
        self._requests: dict[str, Request] = {}
        group_of = model_format_and_tenant if config.quotas else model_and_format
        self._queue = queue = WaitingQueue(self._key_of, self._latest_start_s, config.overtaking_limit_s, group_of)
        self._running = running = RunningRequests(config.growth_reserve_pages, queue, self._swapping, quotas)
        running.num_preemptions = num_preemptions
        self._narrowing = narrowing = NarrowingPolicy(config, kv, running, quotas, self.profiles)
        victims = Victims(kv, running, quotas)
        self._growth = Growth(kv, running, narrowing, quotas, victims)
        self._admission = Admission(config, kv, queue, running, narrowing, quotas, victims)
        self._admission.num_reclaimed = num_reclaimed
        self._model_choice = ModelChoice(self.profiles, config.slo_aware)
        parts = (kv, running, narrowing, self._growth, self._model_choice, self.speculation)
        self._look_ahead = LookAhead(*parts)
        self._deadlines, self._dropped = Deadlines(), list[Request]()
        # Since the last admission pass a request came, or something was freed or can be narrowed.
        self._admission_may_help = False

    def start_over(self, unfinished: Sequence[Request]) -> None:
        """Let these requests, and no others, wait for memory, of which none is held any more.

        For when an operation was cut short and the books cannot be trusted: only what was learnt and counted is kept.
        The KV manager has started over, too.
        """
        self._begin(self.num_preemptions, self.num_reclaimed)
        for request in unfinished:
            request.num_computed_tokens = 0
            if request.status is not RequestStatus.WAITING:
                request.num_preemptions += 1
                self._running.num_preemptions += 1
            self.add(request)

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

    # -- models come and go ----------------------------------------------------------------------------------

    def add_model(self, name: str, cost: ModelCost, row_sizes: Sequence[int]) -> None:
        """Serve a further model, whose page classes the KV manager knows by now.

        Args:
            row_sizes: numbers of rows that its steps are padded to, ascending.

        Raises:
            ConfigError: quotas that cannot divide the memory among so many classes; then nothing has changed.
        """
        self.quotas.note_classes()
        self.profiles[name] = StepProfile(cost, self._roofline)
        self.speculation.row_sizes[name] = row_sizes
        self._note_models()

    def remove_model(self, name: str) -> None:
        """Serve a model no longer, of which there is no request, and whose page classes are gone."""
        self.profiles.pop(name, None)
        self.speculation.row_sizes.pop(name, None)
        self.quotas.note_classes()
        self._note_models()

    def _note_models(self) -> None:
        """Requests that wait already keep their places."""
        costs = {name: profile.model for name, profile in self.profiles.items()}
        self._policy_context = self._policy_context.for_models(costs)

    # -- requests come and go --------------------------------------------------------------------------------

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def __contains__(self, request_id: str) -> bool:
        """Whether an unfinished request has that id."""
        return request_id in self._requests

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests that hold memory, READY or RUNNING."""
        return len(self._running)

    @property
    def is_settled(self) -> bool:
        """Whether an admission pass would admit nobody: since the last one no request came, and nothing was freed or
        can be narrowed."""
        return not (self._admission_may_help and self._queue)

    @property
    def is_short(self) -> bool:
        """Whether requests wait that could not be admitted: there is no memory, or no place in a batch, for them."""
        return bool(self._queue) and not self._admission_may_help

    @property
    def next_deadline_s(self) -> float:
        """When the next request ends because its time is over, by the engine's clock; infinite if none will."""
        return self._deadlines.next_s

    @property
    def num_preemptions(self) -> int:
        """How often a request lost its pages since the start."""
        return self._running.num_preemptions

    @property
    def num_reclaimed(self) -> int:
        """How often that was for a request under a guarantee."""
        return self._admission.num_reclaimed

    def add(self, request: Request) -> None:
        """Let a request wait. The engine has made sure that it fits alone at `max_total_tokens`, its quotas respected.

        Raises:
            RequestError: an id that is in use.
            ConfigError: a model or KV format that is not served.
        """
        if request.request_id in self._requests:
            raise RequestError(f"request_id={request.request_id!r} is in use; give each request its own")
        if request.kv_precision not in self._profile(request.model).model.formats:
            known = ", ".join(self._profile(request.model).model.formats)
            raise ConfigError(f"kv_precision={request.kv_precision!r} is not served by {request.model}; use {known}")
        self._requests[request.request_id] = request
        self._queue.push(request)
        self._deadlines.add(request)
        self._admission_may_help = True

    def finish(self, request: Request, reason: FinishReason, now: float) -> None:
        """End a request wherever it is, even in the middle of a step, and free what it holds."""
        del self._requests[request.request_id]
        if (running := self._running.get(request)) is not None:
            self._running.remove(running)
        else:
            self._queue.remove(request)
        if reason in (FinishReason.STOP, FinishReason.LENGTH) and request.max_total_tokens > request.num_prompt_tokens:
            self._lengths.observe(request)
        self._kv.release(request)
        self.quotas.note(request)
        request.finish_reason, request.times.finished_s, request.fork_of = reason, now, None
        request.status = RequestStatus.FINISHED
        self._admission_may_help = True

    def restart(self, request: Request) -> None:
        """Let a running request be computed again from its first token on: what it has computed no longer holds."""
        if (running := self._running.get(request)) is None:
            raise ValueError(f"request {request.request_id!r} does not run")
        self._running.restart(running)
        self._admission_may_help = True

    def take_dropped(self) -> list[Request]:
        """Requests that were ended since the last call because they were late."""
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
        if request.options.ttft_slo_s is None or request.times.first_token_s is not None or not self.config.slo_aware:
            return math.inf
        return request.times.arrival_s + request.options.ttft_slo_s - self._prefill_s(request)

    # -- a step ----------------------------------------------------------------------------------------------

    def schedule(self, now: float) -> SchedulerOutput | None:
        """The next step, of one model; None when there is no request to compute.

        When decoding requests have to be preempted to make room, nothing is admitted in the same call, unless none is
        left.
        """
        self._kv.begin_step()
        self._narrowing.begin_step()
        preempted = self._growth.grow_all()
        self._admission_may_help |= preempted
        self._end_late(now)
        if self._admission_may_help and not (preempted and self._running):
            self._admit(now)
            self._admission_may_help |= self._kv.is_compacting or self._admission.left_guaranteed
        if not self._running:
            return None
        model = self._model_choice.next(self._running, now)
        output = schedule_step(self._able(model), self.config, self.profiles[model], now)
        output = self.speculation.with_drafts(output, self._running, self.profiles[model])
        for scheduled in output.chunks:
            scheduled.request.status = RequestStatus.RUNNING
        return output

    @contextmanager
    def looking_ahead(self, step: SchedulerOutput, now: float) -> Iterator[SchedulerOutput | None]:
        """The step behind one that is being computed, as far as that can be told; None: it cannot, or there is none.

        Inside, its requests are as they will be when that step is computed, with `UNKNOWN` in the place of the tokens
        that it samples. Those that turn out to have ended then are of no account in the step behind.
        """
        self._end_late(now)
        chunks = self._look_ahead.going_on(step, bool(self._queue)) if self.is_settled else []
        with as_if_computed(chunks):
            yield self._look_ahead.decodes(chunks, now) if chunks else None

    def commit(self, output: SchedulerOutput, sampled: Sequence[int], now: float) -> list[Request]:
        """Enter the outcome of a step.

        Args:
            output: as `schedule` returned it.
            sampled: token for each of `output.chunks`, in that order; the value is ignored where the chunk
                samples none, and where the request was aborted meanwhile.
            now: end of the step, engine clock.

        Returns:
            Requests that got a token, or are computed as far as they wish to be, in the order of `output.chunks`.
        """
        chunks = output.chunks
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
                self._admission_may_help |= request.min_kv_precision is not None  # and be narrowed for who waits
            if computed == len(request.token_ids):
                if computed < request.max_total_tokens:
                    request.token_ids.append(int(token))
                    if request.times.first_token_s is None:
                        request.times.first_token_s = now
                advanced.append(request)
        return advanced

    def note_drafts(self, scheduled: ScheduledChunk, accepted: int) -> None:
        """Learn that the first so many of a decode's drafts were accepted."""
        if (running := self._running.get(scheduled.request)) is not None:
            self.speculation.note(running, len(scheduled.drafts), accepted)

    def commit_draft(self, request: Request, token: int) -> bool:
        """Enter that a step computed a request's last token too, which was a draft, and what it sampled behind it.

        To be called behind `commit`, once for each accepted draft. Returns False, and does nothing, for a request that
        does not run any more: it has ended, or is to be computed again.
        """
        if self._running.get(request) is None:
            return False
        request.num_computed_tokens += 1
        if not request.num_computed_tokens % self.config.page_size:
            self._kv.note_computed(request)
            self._admission_may_help |= request.min_kv_precision is not None
        request.token_ids.append(int(token))
        return True

    def observe(self, output: SchedulerOutput, seconds: float) -> None:
        """Learn from how long a step took on the device; leave out steps that compiled."""
        model = output.chunks[0].request.model
        profile = self._profile(model)
        cost = step_cost(output.chunks, profile.model.formats)
        profile.observe(cost if output.prefills else self.speculation.padded(cost, model), seconds)

    def note_transfer_rate(self, bytes_per_s: float | None) -> None:
        """The measured rate of copies between device and host memory; None: none was timed yet."""
        self._swapping.note_rate(bytes_per_s)

    def _end_late(self, now: float) -> None:
        """End requests whose time is over. Put those whose first token cannot be in time behind the others, or end them
        if they ask for it."""
        for request in self._deadlines.take_overdue(now):
            self._drop(request, now)
        for request in self._queue.defer_missed(now):
            if request.options.drop_when_late:
                self._drop(request, now)

    def _drop(self, request: Request, now: float) -> None:
        """End a request that is late, with what it has."""
        request.kv_tokens = self._kv.tokens_by_format(request)
        self.finish(request, FinishReason.LATE, now)
        self._dropped.append(request)

    def _admit(self, now: float) -> None:
        self._admission_may_help = False
        most = min(self.config.max_batch_size, self.row_limit or self.config.max_batch_size)
        is_full = len(self._running) >= most
        if not self._queue or (is_full and not self.config.quotas):
            return
        num_preemptions = self._running.num_preemptions
        for running in self._admission.admit(now, most):
            request, entry = running.request, running.entry
            request.status = RequestStatus.READY
            if self.config.policy == "tenants" and entry.rank == ON_TIME:
                self._tenant_shares.admitted(entry.key)
            if request.times.admitted_s is None:
                request.times.admitted_s = now
        self._admission_may_help = self._running.num_preemptions > num_preemptions
        if not self._running:
            raise RuntimeError(
                f"none of {len(self._queue)} waiting requests fits although no other holds memory; the "
                "engine must refuse requests that do not fit alone (KVManager.fits_alone)"
            )

    def _able(self, model: str) -> list[RunningRequest]:
        """The model's running requests that have something to compute now."""
        can_advance, able = self._kv.can_advance, []
        for running in self._running:
            request = running.request
            if request.model != model:
                continue
            # One that decodes waits for no pages that another request computes.
            if request.is_decoding or can_advance(request):
                able.append(running)
        return able
