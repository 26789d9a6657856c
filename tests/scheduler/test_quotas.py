"""Quotas: what is guaranteed can be had, no maximum is exceeded, and what nobody wants is lent."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from scheduler_cases import COST, MODEL, PAGE_UNITS, FakeEngine, check_tokens, make_kv, make_request

from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.quotas import check_quotas
from fineserve_jax.request.request import RequestStatus

TENANTS = ("", "alice", "bob")
# A guarantee within which no step needs to wait for copies: preempted decodes alone can put off an admission.
MOST_STEPS_WITHOUT_GUARANTEE = 4


def fill(engine, count, tenant, kv="bf16", prompt=16, output=40):
    for _ in range(count):
        engine.add(make_request(len(engine.requests), prompt, output, kv, engine.now, tenant=tenant))


def share(engine, name):
    account = engine.scheduler.quotas.account
    return account.used[name] / account.most["tenant:all"]


def test_a_guarantee_is_lent_while_idle_and_reclaimed_in_one_step():
    quotas = {"tenant:alice": {"guaranteed": 0.5}, "tenant:all": {}}
    engine = FakeEngine(make_kv(20), quotas=quotas)
    fill(engine, 12, "bob")
    for _ in range(20):
        engine.step()
    assert engine.scheduler.num_waiting
    fill(engine, 12, "alice")
    engine.step()
    assert 0.4 <= share(engine, "tenant:alice") <= 0.5
    assert engine.scheduler.num_reclaimed
    engine.drain()


def test_the_latest_borrower_gives_way_first_and_loses_no_token():
    engine = FakeEngine(make_kv(20), quotas={"tenant:alice": {"guaranteed": 0.3}})
    fill(engine, 12, "bob")
    for _ in range(20):
        engine.step()
    before = [r for r in engine.requests if r in engine.kv.requests]
    fill(engine, 1, "alice")
    engine.step()
    kept = [r for r in before if r in engine.kv.requests]
    assert kept == before[: len(kept)] != before
    engine.drain()
    assert all(request.num_output_tokens == 40 for request in engine.requests)


def test_nobody_takes_what_requests_hold_that_are_not_preemptible():
    """Both hold no more than their guarantees, and a third wants everything."""
    quotas = {"tenant:alice": {"guaranteed": 0.5}, "tenant:bob": {"guaranteed": 0.5}}
    engine = FakeEngine(make_kv(20), quotas=quotas, policy="fcfs")
    fill(engine, 2, "alice", prompt=8, output=20)
    fill(engine, 2, "bob", prompt=8, output=20)
    engine.step()
    fill(engine, 20, "")
    engine.drain()
    assert all(request.num_preemptions == 0 for request in engine.requests[:4])


@pytest.mark.parametrize("name", ["tenant:bob", "precision:bf16", "model:m"])
def test_a_maximum_holds_while_memory_lies_idle(name):
    engine = FakeEngine(make_kv(20), quotas={name: {"max": 0.5}})
    account = engine.scheduler.quotas.account
    fill(engine, 12, "bob")
    while engine.scheduler.has_unfinished:
        engine.step()
        assert account.used[name] <= account.most[name]


def test_a_maximum_does_not_hold_others_back():
    engine = FakeEngine(make_kv(20), policy="fcfs", ageing_s=0.0, quotas={"tenant:bob": {"max": 0.5}})
    fill(engine, 12, "bob")
    fill(engine, 2, "alice")
    engine.step()
    assert all(request in engine.kv.requests for request in engine.requests if request.options.tenant == "alice")


def test_batch_slots_are_reclaimed_like_memory():
    engine = FakeEngine(make_kv(40), max_batch_size=2, quotas={"tenant:alice": {"guaranteed": 0.3}})
    fill(engine, 4, "bob")
    engine.step()
    fill(engine, 1, "alice")
    engine.step()
    assert engine.requests[-1] in engine.kv.requests


def test_a_request_beyond_its_maximum_is_refused():
    engine = FakeEngine(make_kv(20), quotas={"tenant:bob": {"max": 0.2}})
    with pytest.raises(RequestError, match=r"up to 101 tokens takes .* units .*'tenant:bob' allows"):
        fill(engine, 1, "bob", prompt=61)


@pytest.mark.parametrize(
    ("quotas", "message"),
    [
        ({"tenant": {}}, "called 'tenant'; call it"),
        ({"tenant:": {}}, "call it 'tenant:NAME'"),
        ({"precision:int3": {}}, r"'precision:int3', which is not served; the formats are: .*int8"),
        ({"tenant:a": {"guaranteed": 0.7}, "precision:int8": {"guaranteed": 0.4}}, r"add up to 1\.1"),
        ({"tenant:a": {"guaranteed": 0.7, "max": 0.5}}, r"guaranteed=0\.7 is more than max=0\.5"),
        ({"tenant:a": {"max": 0}}, "greater than 0"),
    ],
)
def test_bad_quotas_are_refused(quotas, message):
    with pytest.raises(ConfigError, match=message):
        FakeEngine(make_kv(20), quotas=quotas)


def test_an_arena_too_small_to_divide_is_refused():
    with pytest.raises(ConfigError, match="4 slabs among 4 lengths"):
        FakeEngine(make_kv(4), quotas={"tenant:a": {}})


def test_guarantees_may_add_up_to_one():
    check_quotas(FakeEngine(make_kv(20), quotas={f"tenant:{i}": {"guaranteed": 0.1} for i in range(10)})
                 .scheduler.config.quotas, PAGE_UNITS)  # fmt: skip


requests = st.lists(
    st.tuples(
        st.sampled_from(TENANTS),
        st.sampled_from(list(PAGE_UNITS)),
        st.integers(1, 30),
        st.integers(1, 20),
        st.integers(0, 3),
    ),
    max_size=15,
)


def plans(work, tenants, **options):
    """What each step computes."""
    engine, steps = FakeEngine(make_kv(16), **options), []
    for number, (tenant, kv, prompt, output, wait) in enumerate(work):
        named = {"tenant": tenant} if tenants else {}
        engine.add(make_request(number, prompt, output, kv, engine.now, **named))
        steps += [engine.step() for _ in range(wait)]
    while engine.scheduler.has_unfinished:
        steps.append(engine.step())
    return [[(w.request.sequence, w.start, w.count) for w in output.chunks] if output else None for output in steps]


@settings(max_examples=40)
@given(requests)
def test_without_quotas_tenants_change_nothing(work):
    """Under a policy that learns nothing of them: the default one expects each tenant's answers to go on as before."""
    assert plans(work, tenants=True, policy="fcfs") == plans(work, tenants=False, policy="fcfs")


@settings(max_examples=40)
@given(requests)
def test_quotas_of_tenants_who_stay_away_change_nothing(work):
    quotas = {"tenant:carol": {"guaranteed": 0.6}, "tenant:dave": {"guaranteed": 0.4, "max": 0.5}}
    assert plans(work, tenants=False, quotas=quotas) == plans(work, tenants=False)


class QuotaMachine(RuleBasedStateMachine):
    @initialize(
        slab_policy=st.sampled_from(["elastic", "uniform"]),
        num_slabs=st.integers(8, 24),
        guaranteed=st.tuples(*[st.floats(0, 0.33)] * 3),
        most=st.tuples(*[st.floats(0.33, 1)] * 3),
        policy=st.sampled_from(["fineserve", "fcfs", "sjf"]),
        max_batch_size=st.integers(1, 8),
        ageing_s=st.sampled_from([0.0, 5.0, 1000.0]),
    )
    def start(self, slab_policy, num_slabs, guaranteed, most, **options):
        names = ("tenant:alice", "tenant:bob", "precision:int8")
        quotas = {n: {"guaranteed": g, "max": m} for n, g, m in zip(names, guaranteed, most, strict=True)}
        self.engine = FakeEngine(make_kv(num_slabs, slab_policy), {MODEL: COST}, quotas=quotas, **options)
        self.account = self.engine.scheduler.quotas.account
        self.steps_without = 0

    @rule(
        tenant=st.sampled_from(TENANTS),
        kv=st.sampled_from(list(PAGE_UNITS)),
        prompt=st.integers(1, 40),
        output=st.integers(1, 20),
    )
    def add(self, tenant, kv, prompt, output):
        request = make_request(len(self.engine.requests), prompt, output, kv, self.engine.now, tenant=tenant)
        if self.engine.kv.fits_alone(MODEL, kv, prompt + output):
            try:
                self.engine.add(request)
            except RequestError:
                return

    @rule(steps=st.integers(1, 12))
    def step(self, steps):
        for _ in range(steps):
            self.engine.step()
            self.check()
            self.steps_without = self.steps_without + 1 if self.somebody_lacks_a_guarantee() else 0
            assert self.steps_without <= MOST_STEPS_WITHOUT_GUARANTEE

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def abort(self, data):
        self.engine.abort(data.draw(st.sampled_from(self.engine.requests)))
        self.check()

    def check(self):
        self.account.check()
        assert all(self.account.used[name] <= most for name, most in self.account.most.items())

    def somebody_lacks_a_guarantee(self):
        """Whether the first of a group lies within a guarantee and its maxima, and still waits, though not for a batch
        slot while no running request is preemptible."""
        scheduler = self.engine.scheduler
        quotas, queue, now = scheduler.quotas, scheduler._queue, self.engine.now - 1.0
        preemptible = any(quotas.is_preemptible(running.request) for running in scheduler._running)
        if scheduler.num_running == scheduler.config.max_batch_size and not preemptible:
            return False
        heads = [scheduler._admission.joining(queue.head(group, now)) for group in queue.groups()]
        return any(
            quotas.is_under_guarantee(head.request) and quotas.admits(head.request, head.page_class) for head in heads
        )

    def teardown(self):
        if not hasattr(self, "engine"):
            return
        self.engine.drain()
        for request in self.engine.requests:
            check_tokens(request)
            assert request.status is RequestStatus.FINISHED
        assert not any(self.account.used.values())


QuotaMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25)
test_quota_machine = QuotaMachine.TestCase
