"""Targets: who is too late, what becomes of them, and whose model has the next step."""

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from scheduler_cases import COST, MODEL, PAGE_SIZE, FakeEngine, make_kv, make_request, one_by_one, order_of_admission
from test_admission import arrivals, assert_overtaking_ends

from fineserve_jax.request.request import FinishReason, RequestStatus
from fineserve_jax.scheduler import POLICIES
from fineserve_jax.scheduler.waiting import DEADLINE_MISSED, WaitingQueue, model_and_format


def test_a_request_that_cannot_make_its_target_goes_behind_those_that_can():
    engine = one_by_one()
    engine.add(make_request(1, 8, 2, arrival=0.5, ttft_slo_s=1.0))
    engine.add(make_request(2, 8, 2, arrival=0.6, ttft_slo_s=60.0))
    engine.add(make_request(3, 8, 2, arrival=0.7))
    assert order_of_admission(engine) == [0, 2, 3, 1]
    assert engine.requests[1].finish_reason is FinishReason.LENGTH


def test_targets_that_are_not_to_count_change_no_order():
    engine = one_by_one(slo_aware=False)
    engine.add(make_request(1, 8, 2, arrival=0.5, ttft_slo_s=1.0, drop_when_late=True))
    engine.add(make_request(2, 8, 2, arrival=0.6))
    assert order_of_admission(engine) == [0, 1, 2]


def test_a_late_request_is_dropped_if_and_only_if_it_says_so():
    engine = one_by_one()
    engine.add(make_request(1, 8, 2, arrival=0.5, ttft_slo_s=1.0, drop_when_late=True))
    engine.add(make_request(2, 8, 2, arrival=0.6, ttft_slo_s=1.0))
    assert order_of_admission(engine) == [0, 2]
    dropped = engine.requests[1]
    assert engine.scheduler.take_dropped() == [dropped]
    assert engine.scheduler.take_dropped() == []
    assert (dropped.status, dropped.finish_reason) == (RequestStatus.FINISHED, FinishReason.LATE)
    assert dropped.num_output_tokens == 0


def test_when_all_that_wait_are_dropped_nothing_is_left_to_do():
    engine = FakeEngine(make_kv(40))
    engine.add(make_request(0, 8, 3, arrival=0.0, ttft_slo_s=1.0, drop_when_late=True))
    engine.now = 5.0
    assert engine.step() is None
    assert not engine.scheduler.has_unfinished


def test_a_request_that_has_its_first_token_is_never_late():
    """Preempted, it waits again, long after its target, and is neither dropped nor put behind."""
    engine = FakeEngine(make_kv(3), growth_reserve_pages=0, policy="fcfs", max_chunk_tokens=32)
    most = engine.kv.max_tokens_alone(MODEL, "bf16")
    fields = {"kv": "bf16", "ttft_slo_s": 4.0, "drop_when_late": True}
    for number in range(2):
        engine.add(make_request(number, most // 2 - 2, most // 2, **fields))
    engine.drain()
    assert engine.scheduler.num_preemptions > 0
    assert {r.finish_reason for r in engine.requests} == {FinishReason.LENGTH}


def test_a_request_ends_with_what_it_has_when_its_deadline_has_passed():
    """A step takes a second: the first gives a token, and so does each further one."""
    engine = FakeEngine(make_kv(40), max_chunk_tokens=32)
    late = engine.add(make_request(0, 8, 100, arrival=0.0, deadline_s=5.0))
    done = engine.add(make_request(1, 8, 5, arrival=0.0, deadline_s=5.5))
    other = engine.add(make_request(2, 8, 12, arrival=0.0))
    assert engine.scheduler.next_deadline_s == 5.0
    engine.drain()
    assert [r.finish_reason for r in (late, done, other)] == [
        FinishReason.LATE,
        FinishReason.LENGTH,
        FinishReason.LENGTH,
    ]
    assert (late.num_output_tokens, late.times.finished_s) == (5, 5.0)
    assert late.kv_tokens == {"bf16": 12}
    assert engine.scheduler.take_dropped() == [late]
    assert engine.scheduler.next_deadline_s == float("inf")


def test_a_deadline_ends_those_that_still_wait_too():
    engine = one_by_one()
    engine.add(make_request(1, 8, 2, arrival=0.0, deadline_s=1.5))
    engine.add(make_request(2, 8, 2, arrival=0.0))
    assert order_of_admission(engine) == [0, 2]
    assert (engine.requests[1].finish_reason, engine.requests[1].kv_tokens) == (FinishReason.LATE, {})


def test_edf_goes_by_the_deadline_of_requests_without_a_target_for_their_first_token():
    engine = one_by_one(policy="edf", ageing_s=50.0)
    engine.add(make_request(1, 8, 2, arrival=0.5))
    engine.add(make_request(2, 8, 2, arrival=0.6, deadline_s=40.0))
    engine.add(make_request(3, 8, 2, arrival=0.7, ttft_slo_s=30.0, deadline_s=1000.0))
    assert order_of_admission(engine) == [0, 3, 2, 1]


def test_a_request_is_dropped_in_time_while_nobody_can_be_admitted():
    engine = FakeEngine(make_kv(40), max_batch_size=1)
    engine.add(make_request(0, 8, 100))
    engine.step()
    waiting = engine.add(make_request(1, 8, 2, ttft_slo_s=5.0, drop_when_late=True))
    for _ in range(6):
        engine.step()
    assert waiting.finish_reason is FinishReason.LATE


def test_a_deadline_counts_even_if_steps_have_become_faster_since_it_was_first_missed():
    request = make_request(0, 8, 2)
    latest_start = 10.0
    queue = WaitingQueue(lambda r: r.sequence, lambda r: latest_start)
    queue.push(request)
    latest_start = 14.0
    assert queue.defer_missed(11.0) == []
    assert queue.defer_missed(13.0) == []
    assert queue.defer_missed(15.0) == [request]


def test_a_request_is_late_when_its_prefill_would_not_end_in_time():
    """The roofline takes 21 ms and more for a step."""
    long, short = (make_request(i, 8, 2, ttft_slo_s=slo) for i, slo in enumerate([0.5, 0.51]))
    engine = FakeEngine(make_kv(40))
    queue = WaitingQueue(lambda r: r.sequence, engine.scheduler._latest_start_s)
    queue.push(long)
    queue.push(short)
    assert queue.defer_missed(0.45) == []
    assert queue.defer_missed(0.482) == [long]
    assert queue.head(model_and_format(long)).request is short
    queue.remove(short)
    head = queue.head(model_and_format(long))
    assert (head.rank, head.request) == (DEADLINE_MISSED, long)


def test_late_requests_do_not_wait_for_ever():
    """Two fresh requests a second keep coming and one ends a second; a late one gets in after `overtaking_limit_s`."""

    def wait(overtaking_limit_s):
        engine = one_by_one(overtaking_limit_s=overtaking_limit_s)
        late = engine.add(make_request(1, 4, 1, arrival=0.0, ttft_slo_s=0.5))
        for number in range(2, 202):
            engine.add(make_request(number, 4, 1, arrival=engine.now))
            if number % 2:
                engine.step()
        return late.times.admitted_s

    assert wait(1e6) is None
    assert wait(20.0) == pytest.approx(20.0, abs=1.0)


@settings(max_examples=40)
@given(arrivals, st.sampled_from([2.0, 6.0]), st.sampled_from(list(POLICIES)), st.integers(4, 12))
def test_whatever_the_policy_and_the_targets_overtaking_has_a_limit(coming, limit_s, policy, num_slabs):
    engine = FakeEngine(make_kv(num_slabs), policy=policy, ageing_s=1.0, overtaking_limit_s=limit_s, max_batch_size=4)
    requests, arrival = [], 0.0
    for number, (gap, kv, prompt, output) in enumerate(coming):
        arrival += gap
        if engine.kv.max_tokens_alone(MODEL, kv) >= prompt + output:
            requests.append(make_request(number, prompt, output, kv, arrival, ttft_slo_s=float(number % 3) or None))
    assert_overtaking_ends(engine, requests, limit_s)


# -- several models ----------------------------------------------------------------------------------------------


def two_models(rows, targets=(None, None), **settings):
    """Models m and n, decoding, with so many rows and such targets."""
    engine = FakeEngine(make_kv(200, models=("m", "n")), dict.fromkeys(("m", "n"), COST), **settings)
    number = 0
    for model, count, target_s in zip(("m", "n"), rows, targets, strict=True):
        for _ in range(count):
            engine.add(make_request(number, PAGE_SIZE, 400, "int8", model=model, tpot_slo_s=target_s))
            number += 1
    while any(r.num_output_tokens == 0 for r in engine.requests):
        engine.step(0.021)
    return engine


def turns(engine, steps=60, seconds=0.021):
    return [engine.step(seconds).chunks[0].request.model for _ in range(steps)]


def test_models_take_turns_where_targets_are_not_to_count():
    assert turns(two_models((1, 8), slo_aware=False), 6) in (["m", "n"] * 3, ["n", "m"] * 3)


def test_a_model_with_few_rows_runs_as_seldom_as_its_target_allows():
    """Its step takes 21 ms as the other's does; a token is due every 100 ms."""
    engine = two_models((8, 1), (0.2, 0.1), max_batch_size=16)
    lone = engine.requests[-1]
    started, before = engine.now, lone.num_output_tokens
    share = turns(engine).count("n") / 60
    assert 0.15 < share < 0.35
    assert (engine.now - started) / (lone.num_output_tokens - before) <= 0.1 * 1.05


def test_no_model_is_left_out_for_ever_without_a_target():
    order = "".join(turns(two_models((8, 1), max_batch_size=16), 80))
    assert "n" in order
    assert max(map(len, order.split("n"))) <= 17


def test_rows_far_behind_their_target_do_not_take_every_step():
    engine = two_models((4, 4), (0.001, 0.2), max_batch_size=16)
    order = turns(engine, 60)
    assert order.count("n") >= 15
    late = engine.requests[4]
    assert late.num_output_tokens >= 15
