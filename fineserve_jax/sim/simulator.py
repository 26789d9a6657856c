"""The engine's loop on a virtual clock: scheduler, pools and policies are the engine's own, the runner is a cost model.

    arrivals -> Scheduler.add        while the clock has not reached the next arrival:
                                     output = scheduler.schedule(now)
                                     now   += cost model's seconds for the output
                                     scheduler.commit(output, tokens, now)

While the same requests decode and none arrives, ends or is preempted, each step is like the one before but for one
cached token more of each request. Such steps are taken in one go (`_repeat`): the clock advances step by step, and the
bookkeeping follows at their end. Only pages that would have been moved together between these steps are moved later.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.operations import Copy
from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.request.request import FinishReason, Request, RequestTimes, SchedulerOutput
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler import Scheduler, StepCost
from fineserve_jax.scheduler.costs import step_cost
from fineserve_jax.sim.records import RequestRecord, Run, Sample, StepRecord
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
        fast: take equal steps in one go; off, they are scheduled one by one.
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
    ) -> None:
        self._scheduler, self._kv, self._timers = scheduler, kv, timers
        self._max_output_tokens, self._record_steps = max_output_tokens, record_steps
        self._sample_s, self._fast = sample_s, fast
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
        while True:
            self._add_arrived()
            output = scheduler.schedule(self._now)
            if output is not None:
                self._step(output)
            elif self._next < len(arrivals):
                self._now = arrivals[self._next].arrival_s
            else:
                break
        self._run.requests = [self._record(i) for i in range(len(arrivals))]
        self._run.end_s, self._run.num_preemptions = self._now, scheduler.num_preemptions
        self._run.usable_bytes = measure_usage(self._kv).usable_bytes
        self._run.prediction_error = {name: profile.error for name, profile in scheduler.profiles.items()}
        return self._run

    def _add_arrived(self) -> None:
        """Queue the requests that have arrived by now; one that could never fit is refused."""
        arrivals = self._arrivals
        while self._next < len(arrivals) and arrivals[self._next].arrival_s <= self._now:
            request = self._request(self._next, arrivals[self._next])
            fits = self._kv.fits_alone(request.model, request.kv_precision, request.max_total_tokens)
            if fits:
                tenant, most = request.options.tenant, request.max_total_tokens
                self._scheduler.quotas.check(request.model, request.kv_precision, tenant, most)
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
            options=arrival.options,
        )

    # -- steps ---------------------------------------------------------------------------------------------------

    def _step(self, output: SchedulerOutput) -> None:
        start, model = self._now, output.chunks[0].request.model
        seconds = self._timers[model].predict(self._cost(output))
        self._now = start + seconds
        advanced = self._scheduler.commit(output, [0] * len(output.chunks), self._now)
        if self._run.num_steps < OBSERVED_AT_FIRST or self._run.num_steps % OBSERVED_LATER == 0:
            self._scheduler.observe(output, seconds)
        self._run.num_steps += 1
        ended = self._finish(advanced)
        repeated = self._repeat(output) if self._fast and not output.prefills and not ended else 0
        if self._record_steps:
            prefills = tuple((chunk.request.request_id, chunk.start, chunk.count) for chunk in output.prefills)
            step = StepRecord(start, self._now, model, len(output.decodes), prefills, 1 + repeated)
            self._run.steps.append(step)
        if self._now >= self._next_sample_s:
            self._sample()

    def _cost(self, output: SchedulerOutput) -> StepCost:
        """What the step does, pages that are moved before it included: they are read and written."""
        moves = (move for move in self._kv.take_operations() if isinstance(move, Copy))
        moved_bytes = 2.0 * sum(move.source_class.page_bytes for move in moves)
        formats = self._scheduler.profiles[output.chunks[0].request.model].model.formats
        return step_cost(output.chunks, formats) + StepCost(0, 0, moved_bytes)

    def _finish(self, advanced: Iterable[Request]) -> bool:
        """End the requests that have all their tokens; whether there are any."""
        ended = [request for request in advanced if self._left(request) <= 0]
        for request in ended:
            self._scheduler.finish(request, FinishReason.LENGTH, self._now)
            request.token_ids = []  # an hour of trace has many
        return bool(ended)

    def _left(self, request: Request) -> int:
        return self._arrivals[request.sequence].output_tokens - request.num_output_tokens

    # -- many equal steps -------------------------------------------------------------------------------------

    def _repeat(self, output: SchedulerOutput) -> int:
        """Take the steps that would follow `output` and be like it; how many."""
        scheduler, chunks = self._scheduler, output.decodes
        if not scheduler.is_settled or scheduler.num_running != len(chunks):
            return 0
        most = self._with_memory(output, min(self._left(chunk.request) for chunk in chunks) - 1)
        if most < 1:
            return 0
        count = self._advance_clock(output, most)
        for chunk in chunks:
            chunk.request.token_ids += [0] * count
            chunk.request.num_computed_tokens += count
            self._kv.note_computed(chunk.request)
        self._run.num_steps += count
        return count

    def _with_memory(self, output: SchedulerOutput, count: int) -> int:
        """At most `count` steps for which all requests find pages, whatever order they ask in."""
        groups: dict[tuple[str, str], int] = {}
        for chunk in output.decodes:
            group = (chunk.request.model, chunk.request.kv_precision)
            groups[group] = groups.get(group, 0) + 1
        page_size = self._scheduler.config.page_size
        while count > 0:
            each = (count + 1) // page_size + 1
            if self._kv.can_allocate({self._kv.class_of(*group): n * each for group, n in groups.items()}):
                break
            count //= 2
        return count

    def _advance_clock(self, output: SchedulerOutput, most: int) -> int:
        """Add the times of at most so many steps, up to the next arrival or deadline; how many were taken."""
        chunks = output.decodes
        model = chunks[0].request.model
        formats, predict = self._scheduler.profiles[model].model.formats, self._timers[model].predict
        growth = sum(formats[chunk.request.kv_precision].bytes_per_token for chunk in chunks)
        until = self._arrivals[self._next].arrival_s if self._next < len(self._arrivals) else float("inf")
        until = min(until, self._scheduler.next_deadline_s)
        cost = step_cost(chunks, formats)
        count, now = 0, self._now
        while count < most and now < until:
            count += 1
            cached = cost.kv_tokens + count * len(chunks)
            now += predict(StepCost(cost.tokens, 0, cost.kv_bytes + count * growth, cached))
        self._now = now
        return count

    # -- accounts ------------------------------------------------------------------------------------------------

    def _sample(self) -> None:
        self._next_sample_s = self._now + self._sample_s
        usage = measure_usage(self._kv)
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

    def _record(self, number: int) -> RequestRecord:
        arrival = self._arrivals[number]
        request = self._requests[number]
        if request is None:
            return RequestRecord(arrival, None, None, None, 0, "refused")
        times, reason = request.times, request.finish_reason
        assert reason is not None, f"the scheduler has nothing to do, and request {number} has not ended"
        return RequestRecord(
            arrival,
            times.admitted_s,
            times.first_token_s,
            times.finished_s,
            request.num_preemptions,
            str(reason),
        )
