"""Whatever comes in whatever order, plans keep the rules, nothing is lost, and everything ends."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from scheduler_cases import COST, PAGE_UNITS, FakeEngine, check_tokens, make_kv, make_request

from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.request.request import FinishReason, RequestStatus
from fineserve_jax.scheduler import POLICIES

MODELS = ("m", "n", "w")
WINDOW = 6  # of half of the layers of w


class SchedulerMachine(RuleBasedStateMachine):
    @initialize(
        slab_policy=st.sampled_from(["elastic", "elastic", "partitioned", "uniform"]),
        num_slabs=st.integers(4, 16),
        policy=st.sampled_from(list(POLICIES)),
        max_batch_size=st.integers(1, 6),
        max_chunk_tokens=st.sampled_from([4, 8, 20]),
        chunked_prefill=st.booleans(),
        ageing_s=st.sampled_from([0.0, 5.0, 1000.0]),
        growth_reserve_pages=st.sampled_from([0, 0, 1, 2]),
    )
    def start(self, slab_policy, num_slabs, **options):
        span = WINDOW + options["max_chunk_tokens"] if options["chunked_prefill"] else None
        self.kv = make_kv(num_slabs, slab_policy, MODELS, windows={"w": (WINDOW, span)})
        self.engine = FakeEngine(self.kv, dict.fromkeys(MODELS, COST), **options)

    @rule(
        model=st.sampled_from(MODELS),
        kv=st.sampled_from(list(PAGE_UNITS)),
        prompt=st.integers(1, 40),
        output=st.integers(1, 20),
        ttft=st.sampled_from([None, 1.0, 50.0]),
        drop=st.booleans(),
        tpot=st.sampled_from([None, None, 1e-6, 0.05]),
        priority=st.sampled_from([0, 0, 1, -3]),
        deadline=st.sampled_from([None, None, 3.0, 20.0]),
    )
    def add(self, model, kv, prompt, output, ttft, drop, tpot, priority, deadline):
        most = self.kv.max_tokens_alone(model, kv)
        if most < 2:
            return
        prompt = min(prompt, most - 1)
        output = min(output, most - prompt)
        number, now = len(self.engine.requests), self.engine.now
        fields = {
            "ttft_slo_s": ttft,
            "tpot_slo_s": tpot,
            "drop_when_late": drop and ttft is not None,
            "priority": priority,
            "deadline_s": deadline,
        }
        self.engine.add(make_request(number, prompt, output, kv, now, model, **fields))

    @rule(steps=st.integers(1, 12))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data):
        request = data.draw(st.sampled_from(self.engine.requests))
        self.engine.abort(request)
        assert request.status is RequestStatus.FINISHED

    @invariant()
    def tokens_are_kept(self):
        for request in self.engine.requests if hasattr(self, "engine") else ():
            check_tokens(request)

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        for request in self.engine.requests:
            check_tokens(request)
            whole = request.num_tokens == request.max_total_tokens
            assert whole == (request.finish_reason is FinishReason.LENGTH)
            taken_s, deadline_s = request.times.finished_s - request.times.arrival_s, request.options.deadline_s
            assert deadline_s is None or taken_s < deadline_s + 1.0  # the step in which its time runs out is computed
        assert not self.kv.requests
        self.kv.pool.evict_all()
        assert measure_usage(self.kv).reserved_bytes == 0


SchedulerMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
test_scheduler_machine = SchedulerMachine.TestCase
