"""Level 1: who gets memory, who is passed by, and for how long."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from scheduler_cases import MODEL, PAGE_SIZE, PAGE_UNITS, FakeEngine, make_kv, make_request

from fineserve_jax.kv.usage import measure_usage
from fineserve_jax.request.request import RequestStatus


def held(engine):
    return [r.sequence for r in engine.requests if r in engine.kv.requests]


def test_a_full_pool_of_one_format_does_not_block_another():
    """Partitioned: bf16's quota is taken, and int8 behind a waiting bf16 request is admitted, even an old
    one."""
    engine = FakeEngine(make_kv(8, "partitioned"), policy="fcfs", ageing_s=0.0)
    quota = engine.kv.max_tokens_alone(MODEL, "bf16")
    engine.add(make_request(0, quota - 4, 4, "bf16"))
    engine.add(make_request(1, 8, 4, "bf16"))
    engine.add(make_request(2, 8, 4, "int8"))
    engine.step()
    assert held(engine) == [0, 2]
    assert engine.requests[1].status is RequestStatus.WAITING


def test_within_a_format_nobody_is_passed_by():
    engine = FakeEngine(make_kv(4), policy="fcfs", growth_reserve_pages=0)
    for number, prompt in enumerate([16, 24, 2]):
        engine.add(make_request(number, prompt, 2, "bf16"))
    engine.step()
    assert held(engine) == [0]


@pytest.mark.parametrize("ageing_s", [0.0, 100.0])
def test_another_format_passes_by_until_the_blocked_request_is_old(ageing_s):
    """Elastic: all formats draw on the same free slabs."""
    engine = FakeEngine(make_kv(4), policy="fcfs", ageing_s=ageing_s, growth_reserve_pages=0)
    engine.add(make_request(0, 16, 4, "bf16"))
    engine.add(make_request(1, 24, 4, "bf16"))
    engine.add(make_request(2, 4, 2, "int8"))
    engine.step()
    assert held(engine) == ([0] if ageing_s == 0.0 else [0, 2])


def test_every_running_request_can_grow_by_a_page_after_admission():
    engine = FakeEngine(make_kv(9), policy="fcfs", max_batch_size=8)
    for number in range(8):
        engine.add(make_request(number, 2 * PAGE_SIZE, 9, "bf16"))
    engine.scheduler.schedule(0.0)
    rows = held(engine)
    page_class = engine.kv.class_of(MODEL, "bf16")
    assert rows == [0, 1, 2, 3, 4, 5]
    assert engine.kv.can_allocate({page_class: len(rows)})
    assert not engine.kv.can_allocate({page_class: len(rows) + 3})


def test_a_lone_request_gets_in_whatever_the_reserve():
    engine = FakeEngine(make_kv(3), growth_reserve_pages=50)
    most = engine.kv.max_tokens_alone(MODEL, "fp32")
    engine.add(make_request(0, most - 2, 2, "fp32"))
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_a_request_alone_gets_in_even_if_its_greatest_length_would_not_fit():
    """It may stop long before; another request came and went before it."""
    engine = FakeEngine(make_kv(3), growth_reserve_pages=50)
    engine.add(make_request(0, 4, 2))
    engine.drain()
    early_stopper = make_request(1, 8, 1000)
    engine.scheduler.add(early_stopper)
    output = engine.scheduler.schedule(engine.now)
    assert [scheduled.request for scheduled in output.chunks] == [early_stopper]


def test_nothing_to_grow_into_needs_no_reserve():
    """Requests of one output token never grow, so that they fill the memory to the last page."""
    engine = FakeEngine(make_kv(4), policy="fcfs", max_batch_size=20)
    for number in range(10):
        engine.add(make_request(number, PAGE_SIZE, 1, "bf16"))
    engine.scheduler.schedule(0.0)
    assert held(engine) == list(range(8))


def test_the_batch_is_never_larger_than_allowed():
    engine = FakeEngine(make_kv(50), max_batch_size=3)
    for number in range(7):
        engine.add(make_request(number))
    engine.step()
    assert len(held(engine)) == 3
    engine.drain()


def stream_of_int4(engine, steps):
    """Ever more short int4 requests, two a second, beside one long fp32 request that came at second 3."""
    big = None
    for step in range(steps):
        for i in range(2):
            engine.add(make_request(10_000 + 2 * step + i, 4, 10, "int4", arrival=engine.now))
        if step == 3:
            big = engine.add(make_request(1, engine.kv.max_tokens_alone(MODEL, "fp32") - 1, 1, "fp32", engine.now))
        engine.step()
        if big is not None and big.times.admitted_s is not None:
            return big.times.admitted_s - big.times.arrival_s
    return None


def test_ageing_bounds_the_wait_that_endless_cheap_requests_would_cause():
    """At most `ageing_s`, then those admitted by then (at most 8 rows of at most 11 steps each, side by
    side)."""
    assert stream_of_int4(FakeEngine(make_kv(8), ageing_s=1e6, max_batch_size=8), 300) is None
    ageing_s = 20.0
    wait = stream_of_int4(FakeEngine(make_kv(8), ageing_s=ageing_s, max_batch_size=8), 300)
    assert wait is not None
    assert wait <= ageing_s * 2 + 11 * 8


arrivals = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.5, 1.0, 3.0]),
        st.sampled_from(list(PAGE_UNITS)),
        st.integers(1, 30),
        st.integers(1, 8),
    ),
    min_size=2,
    max_size=40,
)


@settings(max_examples=100)
@given(arrivals, st.sampled_from([0.0, 2.0, 6.0]), st.sampled_from(["fineserve", "fcfs"]), st.integers(4, 12))
@pytest.mark.parametrize("slab_policy", ["elastic", "partitioned"])
def test_nobody_is_admitted_ahead_of_a_competitor_that_came_ageing_seconds_earlier(
    slab_policy, arrivals, ageing_s, policy, num_slabs
):
    engine = FakeEngine(make_kv(num_slabs, slab_policy), policy=policy, ageing_s=ageing_s, max_batch_size=4)
    coming, arrival = [], 0.0
    for number, (gap, kv, prompt, output) in enumerate(arrivals):
        arrival += gap
        most = engine.kv.max_tokens_alone(MODEL, kv)
        if most >= prompt + output:
            coming.append(make_request(number, prompt, output, kv, arrival))
    assert_overtaking_ends(engine, coming, ageing_s)


def assert_overtaking_ends(engine, coming, limit_s, is_bound=lambda admitted, passed_by: True):
    """Serves requests as they come; nobody is admitted ahead of a competitor that came so much earlier, if it is bound
    by that one."""
    while coming or engine.scheduler.has_unfinished:
        while coming and coming[0].times.arrival_s <= engine.now:
            engine.add(coming.pop(0))
        waited = [r for r in engine.requests if r.status is RequestStatus.WAITING]
        if engine.step() is None:
            engine.now += 1.0
            continue
        waiting = [r for r in engine.requests if r.status is RequestStatus.WAITING]
        for admitted in set(waited) - set(waiting):
            for passed_by in waiting:
                if competes(engine.kv, admitted, passed_by) and is_bound(admitted, passed_by):
                    assert admitted.times.arrival_s <= passed_by.times.arrival_s + limit_s


def competes(kv, one, other):
    one, other = (kv.share_names(kv.class_of(r.model, r.kv_precision)) for r in (one, other))
    return not one.isdisjoint(other)


def test_under_uniform_a_cached_page_of_any_format_is_worth_one_of_the_widest():
    engine = FakeEngine(make_kv(8, "uniform"))
    for number in range(2):
        engine.add(make_request(number, 25, 3, "int8"))
        engine.drain()
    assert measure_usage(engine.kv).cached_bytes
    engine.add(make_request(2, 25, 4, "fp32"))
    engine.drain()
