"""The order of the waiting queue."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from scheduler_cases import COST, MODEL, PAGE_UNITS, FakeEngine, make_kv, make_request

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler import POLICIES, SchedulerConfig
from fineserve_jax.scheduler.policies import policy_context
from fineserve_jax.scheduler.waiting import WaitingQueue, model_and_format

AGEING_S = 10.0


def longest_output(request):
    """Most output tokens a request may have: an estimate that needs no history."""
    return request.max_total_tokens - request.num_prompt_tokens


CONTEXT = policy_context(AGEING_S, {MODEL: COST}, longest_output, lambda request: 0.0, None)


def order(policy, requests):
    return [r.sequence for r in sorted(requests, key=lambda r: (POLICIES[policy](r, CONTEXT), r.sequence))]


def test_fineserve_takes_fewer_bits_first_then_less_work():
    sizes = [("bf16", 10, 10), ("int4", 500, 500), ("int4", 10, 40), ("int8", 1, 1), ("int4", 20, 10)]
    requests = [make_request(i, prompt, output, kv) for i, (kv, prompt, output) in enumerate(sizes)]
    assert order("fineserve", requests) == [4, 2, 1, 3, 0]


formats, lengths = st.sampled_from(list(PAGE_UNITS)), st.integers(1, 100_000)


@given(formats, formats, lengths, lengths, st.floats(0, 1e6))
def test_fineserve_lets_nobody_overtake_who_comes_ageing_seconds_later(kv, later_kv, work, later_work, arrival):
    """The bound of the docstring, for the worst against the best format and length."""
    earlier = make_request(0, work, 1, kv, arrival)
    later = make_request(1, later_work, 1, later_kv, arrival + AGEING_S)
    assert POLICIES["fineserve"](earlier, CONTEXT) < POLICIES["fineserve"](later, CONTEXT)


@given(formats, formats, lengths, lengths, st.floats(0, 1e3), st.floats(0, 1e3))
def test_fineserve_is_bits_then_work_minus_age(kv, other_kv, work, other_work, arrival, other_arrival):
    """The key that leaves out the time orders as the ageing priority does, at any time."""

    def priority(request, now):
        w = request.max_total_tokens
        penalty = (CONTEXT.bit_levels[MODEL, request.kv_precision] + w / (w + 1024)) / len(PAGE_UNITS)
        return AGEING_S * penalty - (now - request.times.arrival_s)

    one, other = (
        make_request(0, work, 1, kv, arrival),
        make_request(1, other_work, 1, other_kv, other_arrival),
    )
    key = POLICIES["fineserve"](one, CONTEXT) - POLICIES["fineserve"](other, CONTEXT)
    for now in (1e3, 5e3):
        assert key == pytest.approx(priority(one, now) - priority(other, now), abs=1e-8)


def test_fcfs_is_by_arrival():
    requests = [make_request(i, arrival=a) for i, a in enumerate([3.0, 1.0, 2.0, 1.0])]
    assert order("fcfs", requests) == [1, 3, 2, 0]


def test_sjf_is_by_prompt_and_output():
    requests = [make_request(i, p, o) for i, (p, o) in enumerate([(8, 8), (1, 20), (9, 2)])]
    assert order("sjf", requests) == [2, 0, 1]


def test_edf_is_by_deadline_of_the_first_token_and_ageing_where_there_is_none():
    deadlines = [(0.0, None), (5.0, 4.0), (2.0, 9.5)]
    requests = [make_request(i, arrival=a, ttft_slo_s=slo) for i, (a, slo) in enumerate(deadlines)]
    assert order("edf", requests) == [1, 0, 2]


def test_a_policy_can_be_added_from_outside(monkeypatch):
    monkeypatch.setitem(POLICIES, "longest_first", lambda request, context: -request.num_prompt_tokens)
    engine = FakeEngine(make_kv(40), policy="longest_first", max_batch_size=1)
    for number, prompt in enumerate([3, 9, 5]):
        engine.add(make_request(number, prompt, 1))
    engine.drain()
    assert sorted(range(3), key=lambda i: engine.requests[i].times.admitted_s) == [1, 2, 0]


def test_settings_that_cannot_be_honoured_are_refused_with_a_remedy():
    with pytest.raises(ConfigError, match="policy='lifo': unknown policy; the policies are: fineserve, fcfs"):
        SchedulerConfig(policy="lifo")
    with pytest.raises(ConfigError, match="max_chunk_tokens=100 is not a multiple of page_size=16; use 112"):
        SchedulerConfig(max_chunk_tokens=100)


@given(st.lists(st.tuples(st.sampled_from(["push", "push", "remove", "head"]), st.integers(0, 99)), max_size=300))
def test_the_queue_is_a_sorted_list_that_forgets_what_is_removed(operations):
    queue, model, number = WaitingQueue(lambda r: r.num_prompt_tokens % 7, overtaking_limit_s=1e6), [], 0
    for operation, value in operations:
        if operation == "push":
            request = make_request(number, value + 1, kv=list(PAGE_UNITS)[value % 2])
            queue.push(request)
            model.append(request)
            number += 1
        elif operation == "remove" and model:
            request = model.pop(value % len(model))
            queue.remove(request)
            if value % 3 == 0:  # preempted: waits again
                queue.push(request)
                model.append(request)
        assert len(queue) == len(model)
        assert set(queue.groups()) == {model_and_format(r) for r in model}
        for group in queue.groups():
            members = [r for r in model if model_and_format(r) == group]
            assert queue.head(group).request is min(members, key=lambda r: (r.num_prompt_tokens % 7, r.sequence))
            oldest = queue.head(group, now=1e6).request
            assert oldest is min(members, key=lambda r: r.sequence)


def test_the_queue_keeps_no_memory_of_long_gone_requests():
    queue = WaitingQueue(lambda r: 0.0)
    first = make_request(0)
    queue.push(first)
    for number in range(1, 5000):
        request = make_request(number)
        queue.push(request)
        queue.remove(request)
    heaps = queue._heaps[model_and_format(first)]
    assert len(queue) == 1
    assert len(heaps.on_time) + len(heaps.by_arrival) < 200
    assert len(heaps.ageing) < 100
