"""Priorities: smaller numbers are admitted first and preempted last, and nobody waits for ever."""

import contextlib
import math

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from scheduler_cases import (
    MODEL,
    PAGE_UNITS,
    FakeEngine,
    check_tokens,
    make_kv,
    make_request,
    one_by_one,
    order_of_admission,
)
from test_admission import arrivals, assert_overtaking_ends, held

from fineserve_jax.errors import RequestError
from fineserve_jax.request.request import FinishReason, RequestStatus
from fineserve_jax.request.request_options import MAX_PRIORITY
from fineserve_jax.scheduler import POLICIES

priorities = st.sampled_from([-7, 0, 0, 3, 10**6])


# -- who is admitted first ---------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.lists(st.tuples(priorities, st.sampled_from(list(PAGE_UNITS)), st.integers(1, 30)), max_size=12), st.data())
def test_whatever_the_policy_the_smaller_number_is_admitted_first(waiting, data):
    engine = one_by_one(policy=data.draw(st.sampled_from(list(POLICIES))))
    for number, (priority, kv, prompt) in enumerate(waiting, start=1):
        engine.add(make_request(number, prompt, 1, kv, engine.now, priority=priority))
    engine.drain()
    admitted = sorted(engine.requests[1:], key=lambda r: r.times.admitted_s)
    assert [r.options.priority for r in admitted] == sorted(r.options.priority for r in admitted)


def test_of_one_priority_the_policy_decides():
    engine = one_by_one(policy="sjf")
    for number, (prompt, priority) in enumerate([(20, 1), (5, 1), (9, 0), (30, 0)], start=1):
        engine.add(make_request(number, prompt, 1, priority=priority))
    assert order_of_admission(engine) == [0, 3, 4, 2, 1]


def test_a_missed_deadline_counts_within_a_priority_only():
    """Requests 1 and 3 missed theirs: each comes behind those of its own priority, 1 ahead of the less urgent."""
    engine = one_by_one()
    for number, (slo, priority) in enumerate([(0.5, -1), (60.0, -1), (0.5, 2), (None, 2)], start=1):
        engine.add(make_request(number, 8, 2, arrival=0.1 * number, ttft_slo_s=slo, priority=priority))
    assert order_of_admission(engine) == [0, 2, 1, 4, 3]


@pytest.mark.parametrize(("priority", "is_admitted"), [(-1, True), (0, False), (1, False)])
def test_an_overdue_request_closes_its_memory_to_the_same_and_less_urgent_priorities(priority, is_admitted):
    """A request of priority 0 has waited too long for memory that another format's request could take."""
    engine = FakeEngine(make_kv(4), policy="fcfs", ageing_s=2.0, growth_reserve_pages=0)
    engine.add(make_request(0, 16, 8, "bf16"))
    engine.add(make_request(1, 24, 4, "bf16", arrival=0.0))
    engine.step(3.0)
    other = engine.add(make_request(2, 4, 2, "int8", arrival=3.0, priority=priority))
    engine.step()
    assert (other in engine.kv.requests) == is_admitted
    assert engine.requests[1].status is RequestStatus.WAITING


@pytest.mark.parametrize(("priority", "is_admitted"), [(4, True), (5, False), (6, False)])
def test_an_overdue_request_counts_behind_a_more_urgent_head_of_its_group(priority, is_admitted):
    """Of the bf16 group the head is fresh; behind it one of priority 5 has waited too long."""
    engine = FakeEngine(make_kv(4), policy="fcfs", ageing_s=2.0, growth_reserve_pages=0)
    engine.add(make_request(0, 16, 8, "bf16"))
    engine.add(make_request(1, 24, 4, "bf16", arrival=0.0, priority=5))
    engine.step(3.0)
    engine.add(make_request(2, 24, 4, "bf16", arrival=3.0, priority=0))
    other = engine.add(make_request(3, 4, 2, "int8", arrival=3.0, priority=priority))
    engine.step()
    assert (other in engine.kv.requests) == is_admitted


def test_a_guarantee_comes_before_a_priority():
    engine = FakeEngine(make_kv(20), max_batch_size=1, policy="fcfs", quotas={"tenant:alice": {"guaranteed": 0.5}})
    engine.add(make_request(0, 8, 2, priority=-5))
    engine.add(make_request(1, 8, 2, priority=5, tenant="alice"))
    engine.step()
    assert held(engine) == [1]


# -- who gives way -----------------------------------------------------------------------------------------------


def crowded(priorities, num_slabs=4, **settings):
    """Requests of two bf16 pages that all fit at first, and not when they have grown."""
    engine = FakeEngine(make_kv(num_slabs), growth_reserve_pages=0, policy="fcfs", max_chunk_tokens=64, **settings)
    for number, priority in enumerate(priorities):
        engine.add(make_request(number, 8, 12, "bf16", priority=priority))
    return engine


@pytest.mark.parametrize(
    ("priorities", "preempted"),
    [
        ([0, 0, 0, 0], [2, 3]),
        ([5, 0, 0, 0], [0, 3]),
        ([0, 5, 5, 0], [1, 2]),
        ([0, 5, 7, 0], [1, 2]),
        ([7, 5, -2, 0], [0, 1]),
        ([-2, 5, 5, 5], [2, 3]),
    ],
)
def test_the_least_urgent_give_way_and_of_one_priority_the_latest_admitted(priorities, preempted):
    """Four requests hold all 8 pages and want one more each: two go, so that the others can grow."""
    engine = crowded(priorities)
    while not engine.scheduler.num_preemptions:
        engine.step()
    assert [r.sequence for r in engine.requests if r.status is RequestStatus.WAITING] == preempted
    engine.drain()
    assert all(r.finish_reason is FinishReason.LENGTH for r in engine.requests)


def test_a_less_urgent_request_gives_way_before_one_of_the_own_page_class():
    """The bf16 request wants another page; a later bf16 request is as urgent, an int8 request is not."""
    engine = FakeEngine(make_kv(3), growth_reserve_pages=0, policy="fcfs")
    for number, (kv, prompt, priority) in enumerate([("int8", 16, 1), ("bf16", 8, 0), ("bf16", 8, 0)]):
        engine.add(make_request(number, prompt, 4, kv, priority=priority))
    engine.drain()
    assert [r.num_preemptions > 0 for r in engine.requests] == [True, False, False]


@pytest.mark.parametrize("kept", [0, 1, 2, 3])
def test_the_most_urgent_is_never_preempted(kept):
    engine = crowded([-1 if number == kept else number % 2 for number in range(4)])
    engine.drain()
    assert engine.scheduler.num_preemptions > 0
    assert engine.requests[kept].num_preemptions == 0


# -- nothing else changes, and nobody waits for ever --------------------------------------------------------------

world = {
    "slab_policy": st.sampled_from(["elastic", "elastic", "partitioned"]),
    "num_slabs": st.integers(4, 12),
    "policy": st.sampled_from(list(POLICIES)),
    "ageing_s": st.sampled_from([0.0, 2.0, 1000.0]),
    "overtaking_limit_s": st.sampled_from([3.0, 1000.0]),
    "has_quotas": st.booleans(),
}


def steps_of(coming, priority, slab_policy, num_slabs, has_quotas, **options):
    """What each step computes of requests that all have the same priority."""
    if has_quotas and slab_policy == "elastic" and num_slabs > 5:
        options["quotas"] = {"tenant:a": {"guaranteed": 0.4}, "tenant:b": {"max": 0.9}}
    engine = FakeEngine(make_kv(num_slabs, slab_policy), growth_reserve_pages=0, **options)
    steps = []
    for number, (gap, kv, prompt, output) in enumerate(coming):
        if engine.kv.max_tokens_alone(MODEL, kv) >= prompt + output:
            fields = {"tenant": "ab"[number % 2], "ttft_slo_s": [None, 2.0, 30.0][number % 3], "priority": priority}
            with contextlib.suppress(RequestError):  # more than its tenant may have
                request = make_request(number, prompt, output, kv, engine.now, **fields)
                engine.scheduler.add(request)
                engine.requests.append(request)
        steps += [engine.step() for _ in range(int(2 * gap))]
    while engine.scheduler.has_unfinished:
        steps.append(engine.step())
    return [output and [(c.request.sequence, c.start, c.count) for c in output.chunks] for output in steps]


@settings(max_examples=60)
@given(arrivals, st.fixed_dictionaries(world), st.sampled_from([-MAX_PRIORITY, -1, 1, MAX_PRIORITY]))
def test_where_all_priorities_are_equal_their_number_changes_nothing(coming, options, priority):
    assert steps_of(coming, priority, **options) == steps_of(coming, 0, **options)


def requests_of(engine, coming, numbers, **fields):
    requests, arrival = [], 0.0
    for number, ((gap, kv, prompt, output), priority) in enumerate(zip(coming, numbers, strict=False)):
        arrival += gap
        if engine.kv.max_tokens_alone(MODEL, kv) >= prompt + output:
            requests.append(make_request(number, prompt, output, kv, arrival, priority=priority, **fields))
    return requests


numbers = st.lists(priorities, min_size=40, max_size=40)


@settings(max_examples=60)
@given(arrivals, numbers, st.sampled_from([2.0, 6.0]), st.sampled_from(list(POLICIES)), st.integers(4, 12))
def test_whatever_the_priorities_overtaking_has_a_limit(coming, numbers, limit_s, policy, num_slabs):
    engine = FakeEngine(make_kv(num_slabs), policy=policy, ageing_s=1.0, overtaking_limit_s=limit_s, max_batch_size=4)
    assert_overtaking_ends(engine, requests_of(engine, coming, numbers), limit_s)
    for request in engine.requests:
        check_tokens(request)
        assert request.num_tokens == request.max_total_tokens


@settings(max_examples=60)
@given(arrivals, numbers, st.sampled_from([0.0, 2.0, 6.0]), st.sampled_from(["fineserve", "fcfs"]), st.integers(4, 12))
@pytest.mark.parametrize("slab_policy", ["elastic", "partitioned"])
def test_nobody_is_admitted_ahead_of_an_older_competitor_that_is_at_least_as_urgent(
    slab_policy, coming, numbers, ageing_s, policy, num_slabs
):
    engine = FakeEngine(make_kv(num_slabs, slab_policy), policy=policy, ageing_s=ageing_s, max_batch_size=4)
    requests = requests_of(engine, coming, numbers)
    assert_overtaking_ends(
        engine, requests, ageing_s, lambda admitted, other: other.options.priority <= admitted.options.priority
    )


@settings(max_examples=60)
@given(arrivals, numbers, st.sampled_from(list(POLICIES)), st.integers(4, 12))
def test_nobody_is_admitted_ahead_of_a_more_urgent_request_of_its_group(coming, numbers, policy, num_slabs):
    """However late it came, as long as nobody has waited for `overtaking_limit_s`."""
    engine = FakeEngine(make_kv(num_slabs), policy=policy, overtaking_limit_s=1e6, max_batch_size=4)

    def is_bound(admitted, other):
        same_group = admitted.kv_precision == other.kv_precision
        return same_group and other.options.priority < admitted.options.priority

    assert_overtaking_ends(engine, requests_of(engine, coming, numbers), -math.inf, is_bound)


def test_a_request_that_has_waited_long_enough_ends_however_many_more_urgent_ones_keep_coming():
    """Two urgent requests a second, of which the memory holds a few that always outgrow it."""

    def served(limit_s):
        engine = FakeEngine(
            make_kv(4), policy="fcfs", growth_reserve_pages=0, max_chunk_tokens=64, overtaking_limit_s=limit_s
        )
        least_urgent = engine.add(make_request(0, 8, 12, priority=9))
        for number in range(1, 301):
            engine.add(make_request(number, 8, 12, arrival=engine.now, priority=0))
            if number % 2:
                engine.step()
        return least_urgent

    assert served(1e6).finish_reason is None
    assert served(20.0).finish_reason is FinishReason.LENGTH
