"""A small world to schedule in: four KV formats, a real KVManager, and an engine that fakes only the
model."""

from collections.abc import Mapping

from fineserve_jax.kv.allocator import SlabAllocator
from fineserve_jax.kv.classes import PageClass
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.request.request import FinishReason, Request, RequestStatus, RequestTimes, SchedulerOutput
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams
from fineserve_jax.scheduler import DeviceRoofline, FormatCost, ModelCost, Scheduler, SchedulerConfig

PAGE_SIZE = 4
OPTION_FIELDS = RequestOptions.model_fields.keys() - {"model", "kv_precision", "min_kv_precision"}
MODEL = "m"
PAGE_UNITS = {"fp32": 8, "bf16": 4, "int8": 2, "int4": 1}
FORMATS = {name: FormatCost(bits=4.0 * units, bytes_per_token=1000.0 * units) for name, units in PAGE_UNITS.items()}
COST = ModelCost(flops_per_token=2e8, flops_per_pair=1e5, weight_bytes=2e8, formats=FORMATS)
ROOFLINE = DeviceRoofline(flops=1e12, bandwidth=1e10, overhead_s=1e-3)


def make_kv(
    num_slabs: int,
    policy: str = "elastic",
    models=(MODEL,),
    slab_units: int = 8,
    page_size=PAGE_SIZE,
    reserve_slabs=0,
    windows: Mapping[str, tuple[int, int | None]] | None = None,
    **options,
):
    """A manager. `windows`: window and span of the models half of whose layers have a window."""
    classes = {}
    for model in models:
        groups = {}
        if model in (windows or {}):
            window, span = windows[model]
            groups = make_classes(model, page_size, {}, group=1, window=window, span=span)
        classes |= {(model, name): own for name, own in make_classes(model, page_size, groups).items()}
    allocator = SlabAllocator((num_slabs + 1) * slab_units, slab_units, policy, classes.values(), **options)
    return KVManager(allocator, classes, reserve_slabs=reserve_slabs)


def make_classes(model: str, page_size: int, others: Mapping[str, PageClass], **group) -> dict[str, PageClass]:
    """The classes of a layer group, by format; `others`: those of the group behind it."""
    made: dict[str, PageClass] = {}
    for name, units in {"bf16": PAGE_UNITS["bf16"], **PAGE_UNITS}.items():
        behind = (others[name],) if others else ()
        residual = made["bf16"] if name == "int4" else None
        made[name] = PageClass(model, name, units, page_size, 16, residual, others=behind, **group)
    return made


def make_request(number: int, prompt=8, output=4, kv="bf16", arrival=0.0, model=MODEL, **fields) -> Request:
    """With `fields` of `Request`, or of its options."""
    asked = {name: fields.pop(name) for name in OPTION_FIELDS & fields.keys()}
    return Request(
        request_id=f"r{number}",
        model=model,
        kv_precision=kv,
        sampling=SamplingParams(max_tokens=output),
        token_ids=[token(number, i) for i in range(prompt)],
        num_prompt_tokens=prompt,
        max_total_tokens=prompt + output,
        sequence=number,
        times=RequestTimes(arrival_s=arrival),
        options=RequestOptions(**asked),
        **fields,
    )


def token(number: int, position: int) -> int:
    """The one right token of a request at a position."""
    return (number * 7919 + position * 104729) % 49152


def make_scheduler(kv: KVManager, models: Mapping[str, ModelCost] | None = None, **settings) -> Scheduler:
    return Scheduler(
        SchedulerConfig(**{"page_size": PAGE_SIZE, "max_chunk_tokens": 16} | settings),
        kv,
        models or {MODEL: COST},
        ROOFLINE,
    )


class FakeEngine:
    """The engine's loop around a real scheduler and a real KVManager, checking every step."""

    def __init__(self, kv: KVManager, models: Mapping[str, ModelCost] | None = None, **settings) -> None:
        self.kv = kv
        self.scheduler = make_scheduler(kv, models, **settings)
        self.requests: list[Request] = []
        self.now = 0.0

    def add(self, request: Request) -> Request:
        assert self.kv.fits_alone(request.model, request.kv_precision, request.max_total_tokens)
        self.scheduler.quotas.check(
            request.model, request.kv_precision, request.options.tenant, request.max_total_tokens
        )
        self.requests.append(request)
        self.scheduler.add(request)
        return request

    def step(self, seconds: float = 1.0) -> SchedulerOutput | None:
        output = self.scheduler.schedule(self.now)
        check_integrity(self.kv)
        self.check_counts()
        if output is None:
            return None
        check_output(output, self.kv, self.scheduler.config)
        self.now += seconds
        sampled = [token(scheduled.request.sequence, scheduled.start + scheduled.count) for scheduled in output.chunks]
        advanced = self.scheduler.commit(output, sampled, self.now)
        for request in advanced:
            check_tokens(request)
            if request.num_tokens == request.max_total_tokens:
                self.scheduler.finish(request, FinishReason.LENGTH, self.now)
        return output

    def abort(self, request: Request) -> None:
        """End a request wherever it is; one that has ended already is left as it is."""
        if request.status is not RequestStatus.FINISHED:
            self.scheduler.finish(request, FinishReason.ABORT, self.now)

    def drain(self, most_steps: int = 50_000) -> int:
        """Step until nothing is left; the number of steps."""
        steps = 0
        while self.scheduler.has_unfinished:
            output = self.step()
            assert output is not None or not self.scheduler.has_unfinished, "unfinished requests, and nothing to run"
            steps += 1
            assert steps <= most_steps, "livelock"
        assert self.step() is None
        return steps

    def check_counts(self) -> None:
        holding = [r for r in self.requests if r.status in (RequestStatus.READY, RequestStatus.RUNNING)]
        waiting = [r for r in self.requests if r.status is RequestStatus.WAITING]
        assert set(self.kv.requests) == set(holding)
        assert self.scheduler.num_running == len(holding) <= self.scheduler.config.max_batch_size
        assert self.scheduler.num_waiting == len(waiting)
        assert self.scheduler.has_unfinished == bool(holding or waiting)
        assert all(request.num_computed_tokens == 0 for request in waiting)
        self.check_running(holding)

    def check_running(self, holding: list[Request]) -> None:
        """What the scheduler noted of each running request, against the KVManager and against counting anew."""
        running = self.scheduler._running
        reserved = {group: 0 for first in self.kv.classes.values() for group in first.groups}
        assert {of.request for of in running} == set(holding)
        for of in running:
            request, covered = of.request, of.covered_tokens
            assert self.kv.demand(request, covered) == {}
            # Where there is a window, further pages may not be needed before what these hold is computed.
            assert self.kv.demand(request, covered + 1) or of.page_class.others
            to_come = self.kv.demand(request, request.max_total_tokens - 1)
            for group in of.groups:
                wanted = min(self.scheduler.config.growth_reserve_pages, to_come.get(group, 0))
                reserved[group] += wanted if group.window is None else of.reserved_pages.get(group, 0)
        assert reserved == dict.fromkeys(reserved, 0) | running.reserve._pages


def check_tokens(request: Request) -> None:
    assert request.token_ids == [token(request.sequence, i) for i in range(request.num_tokens)]


def check_output(output: SchedulerOutput, kv: KVManager, config: SchedulerConfig) -> None:
    chunks, page_size = output.chunks, config.page_size
    assert chunks
    assert len({scheduled.request for scheduled in chunks}) == len(chunks) <= config.max_batch_size
    assert len({scheduled.request.model for scheduled in chunks}) == 1
    for scheduled in chunks:
        request = scheduled.request
        assert request.status is RequestStatus.RUNNING
        assert scheduled.start == request.num_computed_tokens
        assert scheduled.start + scheduled.count <= request.num_tokens
        assert kv.demand(request, scheduled.start + scheduled.count) == {}
    assert all(scheduled.count == 1 and scheduled.samples for scheduled in output.decodes)
    for chunk in output.prefills:
        assert chunk.count > 1
        assert chunk.start % page_size == 0
        assert chunk.count % page_size == 0 or chunk.samples
        assert chunk.samples or config.chunked_prefill
    rounded = sum(-(-chunk.count // page_size) * page_size for chunk in output.prefills)
    assert rounded <= config.max_chunk_tokens or (not config.chunked_prefill and len(output.prefills) == 1)


def one_by_one(**settings):
    """An engine that holds one request at a time, held by one that has not ended yet."""
    engine = FakeEngine(make_kv(40), **{"max_batch_size": 1, "policy": "fcfs"} | settings)
    engine.add(make_request(0, 8, 3))
    engine.step()
    return engine


def order_of_admission(engine):
    """Sequence numbers of the requests that were admitted at all, once nothing is left to do."""
    engine.drain()
    admitted = [r for r in engine.requests if r.times.admitted_s is not None]
    return [r.sequence for r in sorted(admitted, key=lambda r: r.times.admitted_s)]
