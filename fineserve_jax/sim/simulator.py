"""The engine's loop on a virtual clock: scheduler, pools and policies are the engine's own, the runner is a cost model.

    arrivals -> Scheduler.add        while the clock has not reached the next arrival:
                                     plan  = scheduler.schedule(now)
                                     now  += cost model's seconds for the plan
                                     scheduler.commit(plan, tokens, now)

While the same rows decode and nobody comes, ends or needs to give way, each step is like the one before but for a
token more in each row. Such a run is taken in one go (`_repeat`): the clock advances step by step, the bookkeeping
at its end. Only pages that would have been moved together between these steps are moved later.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.operations import Copy
from fineserve_jax.request import FinishReason, Request, RequestTimes, SchedulerOutput
from fineserve_jax.sampling_params import SamplingParams
from fineserve_jax.scheduler import Scheduler, StepCost
from fineserve_jax.scheduler.costs import step_cost
from fineserve_jax.sim.workload import Arrival

GREEDY = SamplingParams()
PREFIXES = 10**8
"""Tokens from here on stand for prefixes, smaller ones for requests."""
OBSERVED_AT_FIRST = 64
OBSERVED_LATER = 16
"""The scheduler's own profile learns from the first steps, then from one in so many: it fits at every one."""


class StepTimer(Protocol):
    """The cost model of one model: seconds of a step. `scheduler.StepProfile` is one."""

    def predict(self, cost: StepCost) -> float: ...


@dataclass(frozen=True, slots=True)
class Served:
    """What became of an arrival; times in seconds, None where it never got there.

    Attributes:
        arrival: as it came.
        admitted_s, first_token_s, finished_s: when it got memory, its first and its last token.
        num_preemptions: how often it lost its pages.
        outcome: `length` for one that got all its tokens, `late` for one that was dropped, `refused` for one
            that could never fit.
    """

    arrival: Arrival
    admitted_s: float | None
    first_token_s: float | None
    finished_s: float | None
    num_preemptions: int
    outcome: str

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token_s is None else self.first_token_s - self.arrival.arrival_s

    @property
    def tpot_s(self) -> float | None:
        """Seconds a token after the first; 0 for a request of one token, which has none to wait for."""
        if self.outcome != "length" or self.finished_s is None or self.first_token_s is None:
            return None
        return (self.finished_s - self.first_token_s) / max(1, self.arrival.output_tokens - 1)

    @property
    def in_time(self) -> bool:
        """Whether it was answered within its targets."""
        ttft, tpot, wanted = self.ttft_s, self.tpot_s, self.arrival
        if ttft is None or tpot is None:
            return False
        ttft_met = wanted.ttft_slo_s is None or ttft <= wanted.ttft_slo_s
        return ttft_met and (wanted.tpot_slo_s is None or tpot <= wanted.tpot_slo_s)


@dataclass(frozen=True, slots=True)
class Step:
    """A step, or a run of `count` like ones, for the trace."""

    start_s: float
    end_s: float
    model: str
    num_decodes: int
    chunks: tuple[tuple[str, int, int], ...]
    count: int


@dataclass(frozen=True, slots=True)
class Sample:
    """How things stood: requests waiting and running, bytes needed and reserved in all, and reserved by format."""

    time_s: float
    num_waiting: int
    num_running: int
    needed_bytes: int
    reserved_bytes: int
    reserved_by_format: Mapping[str, int]


@dataclass
class Run:
    """What a simulation gave.

    Attributes:
        served: one entry an arrival, in the order of arrival.
        samples: how things stood, at most one every `sample_s`.
        steps: every step, if they were to be recorded.
        end_s: clock at the end.
        usable_bytes: KV memory that can be handed out.
        num_steps, num_preemptions: counts.
        prediction_error: typical relative error of the scheduler's predictions, by model.
    """

    served: list[Served]
    samples: list[Sample] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    end_s: float = 0.0
    usable_bytes: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prediction_error: dict[str, float | None] = field(default_factory=dict)


def _tokens(number: int, arrival: Arrival) -> list[int]:
    """A prompt: after the prefix that the workload tells of, it has nothing in common with any other."""
    shared = min(arrival.prefix_tokens, arrival.prompt_tokens - 1)
    return [PREFIXES + arrival.prefix] * shared + [number] + [0] * (arrival.prompt_tokens - shared - 1)


class Simulator:
    """Serves arrivals with a scheduler whose steps take as long as cost models say.

    Args:
        scheduler, kv: the engine's own, as a system under test wants them.
        timers: cost model of each model the scheduler serves.
        max_output_tokens: what requests say at most to generate: their scheduler knows no better.
        record_steps: keep every step for a trace.
        sample_s: least time between two samples of memory and queues.
        fast: take runs of equal steps in one go; off, they are planned one by one.
        stop_s: clock at which the simulation ends, served or not; None: when all are served.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVManager,
        timers: Mapping[str, StepTimer],
        *,
        max_output_tokens: int = 2048,
        record_steps: bool = False,
        sample_s: float = 1.0,
        fast: bool = True,
        stop_s: float | None = None,
        on_step: Callable[[float], None] | None = None,
    ) -> None:
        self._scheduler, self._kv, self._timers = scheduler, kv, timers
        self._max_output_tokens, self._record_steps = max_output_tokens, record_steps
        self._sample_s, self._fast, self._stop_s, self._on_step = sample_s, fast, stop_s, on_step
        self._arrivals: Sequence[Arrival] = ()
        self._requests: list[Request | None] = []
        self._next = 0
        self._now = 0.0
        self._next_sample_s = 0.0
        self._run = Run([])

    def run(self, arrivals: Sequence[Arrival]) -> Run:
        """Serve arrivals, sorted by time, to the end."""
        self._arrivals = arrivals
        scheduler = self._scheduler
        while self._stop_s is None or self._now < self._stop_s:
            self._let_in()
            plan = scheduler.schedule(self._now)
            if plan is not None:
                self._step(plan)
            elif self._next < len(arrivals):
                self._now = arrivals[self._next].arrival_s
            else:
                break
        self._run.served = [self._outcome(i) for i in range(len(arrivals))]
        self._run.end_s, self._run.num_preemptions = self._now, scheduler.num_preemptions
        self._run.usable_bytes = self._kv.usage().usable_bytes
        self._run.prediction_error = {name: profile.error for name, profile in scheduler.profiles.items()}
        return self._run

    def _let_in(self) -> None:
        arrivals = self._arrivals
        while self._next < len(arrivals) and arrivals[self._next].arrival_s <= self._now:
            request = self._request(self._next, arrivals[self._next])
            fits = self._kv.fits_alone(request.model, request.kv_precision, request.max_total_tokens)
            if fits:
                self._scheduler.add(request)
            self._requests.append(request if fits else None)
            self._next += 1

    def _request(self, number: int, arrival: Arrival) -> Request:
        prompt = arrival.prompt_tokens
        return Request(
            request_id=str(number),
            model=arrival.model,
            kv_precision=arrival.kv_precision,
            sampling=GREEDY,
            token_ids=_tokens(number, arrival),
            num_prompt_tokens=prompt,
            max_total_tokens=prompt + max(arrival.output_tokens, self._max_output_tokens),
            sequence=number,
            times=RequestTimes(arrival.arrival_s),
            ttft_slo_s=arrival.ttft_slo_s,
            tpot_slo_s=arrival.tpot_slo_s,
            drop_when_late=arrival.drop_when_late,
            tenant=arrival.tenant,
        )

    # -- steps ---------------------------------------------------------------------------------------------------

    def _step(self, plan: SchedulerOutput) -> None:
        chunks, scheduler, start = plan.chunks, self._scheduler, self._now
        model = chunks[0].request.model
        # Pages that are moved before the step are read and written.
        moved = 2.0 * sum(move.source_class.page_bytes for move in self._kv.take_operations() if isinstance(move, Copy))
        cost = step_cost(chunks, scheduler.profiles[model].model.formats) + StepCost(0, 0, moved)
        seconds = self._timers[model].predict(cost)
        self._now = start + seconds
        advanced = scheduler.commit(plan, [0] * len(chunks), self._now)
        number = self._run.num_steps
        if number < OBSERVED_AT_FIRST or number % OBSERVED_LATER == 0:
            scheduler.observe(plan, seconds)
        self._run.num_steps += 1
        ended = [request for request in advanced if self._left(request) <= 0]
        for request in ended:
            scheduler.finish(request, FinishReason.LENGTH, self._now)
            request.token_ids = []  # an hour of trace has many
        count = 1
        if self._fast and not plan.prefills and not ended:
            count += self._repeat(plan)
        if self._record_steps:
            prefills = tuple(
                (scheduled.request.request_id, scheduled.start, scheduled.count) for scheduled in plan.prefills
            )
            self._run.steps.append(Step(start, self._now, model, len(plan.decodes), prefills, count))
        if self._now >= self._next_sample_s:
            self._sample()
        if self._on_step is not None:
            self._on_step(self._now)

    def _left(self, request: Request) -> int:
        return self._arrivals[request.sequence].output_tokens - request.num_output_tokens

    def _repeat(self, plan: SchedulerOutput) -> int:
        """Take the steps that would follow `plan` and be like it; how many."""
        scheduler, chunks = self._scheduler, plan.decodes
        if not scheduler.is_settled or scheduler.num_running != len(chunks):
            return 0
        most = self._with_memory(plan, min(self._left(scheduled.request) for scheduled in chunks) - 1)
        if most < 1:
            return 0
        model = chunks[0].request.model
        formats, predict = scheduler.profiles[model].model.formats, self._timers[model].predict
        growth = sum(formats[scheduled.request.kv_precision].bytes_per_token for scheduled in chunks)
        until = self._arrivals[self._next].arrival_s if self._next < len(self._arrivals) else float("inf")
        until = until if self._stop_s is None else min(until, self._stop_s)
        cost = step_cost(chunks, formats)
        count, now = 0, self._now
        while count < most and now < until:
            count += 1
            now += predict(
                StepCost(cost.tokens, 0, cost.kv_bytes + count * growth, cost.kv_tokens + count * len(chunks))
            )
        self._now = now
        for scheduled in chunks:
            scheduled.request.token_ids += [0] * count
            scheduled.request.num_computed_tokens += count
            self._kv.note_computed(scheduled.request)
        self._run.num_steps += count
        return count

    def _with_memory(self, plan: SchedulerOutput, count: int) -> int:
        """At most `count` steps for which all rows find pages, whatever order they ask in."""
        rows: dict[tuple[str, str], int] = {}
        for scheduled in plan.decodes:
            group = (scheduled.request.model, scheduled.request.kv_precision)
            rows[group] = rows.get(group, 0) + 1
        page_size = self._scheduler.config.page_size
        while count > 0:
            each = (count + 1) // page_size + 1
            if self._kv.allocator.can_allocate({self._kv.class_of(*group): n * each for group, n in rows.items()}):
                break
            count //= 2
        return count

    # -- accounts ------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        self._next_sample_s = self._now + self._sample_s
        usage = self._kv.usage()
        self._run.samples.append(
            Sample(
                self._now,
                self._scheduler.num_waiting,
                self._scheduler.num_running,
                usage.needed_bytes,
                usage.reserved_bytes,
                {name: of_format.reserved_bytes for name, of_format in usage.formats.items()},
            )
        )

    def _outcome(self, number: int) -> Served:
        arrival = self._arrivals[number]
        request = self._requests[number] if number < len(self._requests) else None
        if request is None:
            outcome = "refused" if number < len(self._requests) else "unserved"
            return Served(arrival, None, None, None, 0, outcome)
        times, reason = request.times, request.finish_reason
        return Served(
            arrival,
            times.admitted_s,
            times.first_token_s,
            times.finished_s,
            request.num_preemptions,
            "unserved" if reason is None else str(reason),
        )
