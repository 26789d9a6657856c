"""When memory runs out: who gives way, and what is kept."""

import pytest
from scheduler_cases import COST, MODEL, FakeEngine, check_tokens, make_kv, make_request, make_scheduler

from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.request.request import FinishReason, RequestStatus


def crowded(num_slabs=4, number=4, **settings):
    """Requests that all fit at first, and not when they have grown."""
    settings = {"growth_reserve_pages": 0, "policy": "fcfs", "max_chunk_tokens": 64} | settings
    engine = FakeEngine(make_kv(num_slabs), **settings)
    for i in range(number):
        engine.add(make_request(i, 8, 12, "bf16"))
    return engine


def test_the_latest_admitted_give_way_and_keep_their_tokens():
    """Four rows hold all 8 pages and want one more each: two go, so that the older two can grow."""
    engine = crowded()
    while not engine.scheduler.num_preemptions:
        engine.step()
    running, preempted = engine.requests[:2], engine.requests[2:]
    assert [r.status for r in running] == [RequestStatus.RUNNING] * 2
    assert [r.num_computed_tokens for r in running] == [9, 9]
    assert [r.status for r in preempted] == [RequestStatus.WAITING] * 2
    assert [(r.num_computed_tokens, r.num_output_tokens, r.num_preemptions) for r in preempted] == [(0, 1, 1)] * 2
    engine.drain()
    assert all(r.num_tokens == r.max_total_tokens for r in preempted)


def test_the_oldest_is_never_preempted_and_all_end_in_order():
    engine = crowded(number=8)
    engine.drain()
    assert engine.scheduler.num_preemptions > 3
    assert engine.requests[0].num_preemptions == 0
    ends = [r.times.finished_s for r in engine.requests]
    assert ends == sorted(ends)


def test_the_reserve_makes_preemptions_rare():
    assert crowded(8, 8).drain() > 0
    without, with_reserve = crowded(8, 16), crowded(8, 16, growth_reserve_pages=2)
    without.drain()
    with_reserve.drain()
    assert with_reserve.scheduler.num_preemptions < without.scheduler.num_preemptions / 2


def test_nothing_is_admitted_in_the_call_that_preempts():
    """Request 1 loses 5 pages when request 0 wants its 4th; the int8 request that they could hold waits a
    step."""
    engine = FakeEngine(make_kv(4), growth_reserve_pages=0, policy="fcfs", max_chunk_tokens=64)
    engine.add(make_request(0, 12, 6, "bf16"))
    engine.add(make_request(1, 19, 6, "bf16"))
    other = engine.add(make_request(2, 4, 2, "int8"))
    while not engine.scheduler.num_preemptions:
        assert other.status is RequestStatus.WAITING
        engine.step()
    assert [r.status is RequestStatus.WAITING for r in engine.requests] == [False, True, True]
    engine.step()
    assert [r.status is RequestStatus.WAITING for r in engine.requests] == [False, True, False]
    engine.drain()


def test_without_a_younger_row_of_the_same_format_the_latest_of_the_others_gives_way():
    """Each of three formats holds one slab; the bf16 row wants another."""
    engine = FakeEngine(make_kv(3), growth_reserve_pages=0, policy="fcfs")
    for number, (prompt, kv) in enumerate([(8, "bf16"), (4, "int8"), (4, "fp32")]):
        engine.add(make_request(number, prompt, 6, kv))
    engine.drain()
    assert [r.num_preemptions for r in engine.requests] == [0, 0, 1]


def test_in_a_partition_only_rows_of_the_same_share_give_way():
    kv = make_kv(10, "partitioned", shares={"bf16": 4, "int8": 2, "int4": 2, "fp32": 2})
    engine = FakeEngine(kv, growth_reserve_pages=0, policy="fcfs", max_chunk_tokens=64)
    for i in range(4):
        engine.add(make_request(i, 8, 12, "bf16"))
    bystander = engine.add(make_request(4, 8, 20, "int8"))
    engine.drain()
    assert engine.scheduler.num_preemptions > 0
    assert bystander.num_preemptions == 0


def test_several_models_take_turns():
    engine = FakeEngine(make_kv(60, models=("a", "b")), {"a": COST, "b": COST})
    for i in range(4):
        engine.add(make_request(i, 4, 6, model="ab"[i % 2]))
    models = [engine.step().chunks[0].request.model for _ in range(8)]
    assert models == ["a", "b"] * 4
    engine.drain()


def test_the_same_calls_give_the_same_plans():
    def plans():
        engine = crowded(number=9, policy="fineserve")
        while engine.scheduler.has_unfinished:
            output = engine.step()
            yield [(w.request.sequence, w.start, w.count) for w in output.chunks]

    assert list(plans()) == list(plans())


def test_abort_frees_a_request_wherever_it_is_even_in_the_middle_of_a_step():
    engine = crowded(number=6)
    scheduler = engine.scheduler
    scheduler.finish(engine.requests[5], FinishReason.ABORT, 1.0)
    output = scheduler.schedule(1.0)
    running = output.chunks[1].request
    scheduler.finish(running, FinishReason.ABORT, 2.0)
    assert running not in engine.kv.requests
    assert running not in scheduler.commit(output, [1] * len(output.chunks), 3.0)
    assert (running.status, running.finish_reason) == (RequestStatus.FINISHED, FinishReason.ABORT)
    assert running.num_output_tokens == 0


def test_commit_notes_the_first_token_and_who_got_one():
    engine = FakeEngine(make_kv(40), max_chunk_tokens=8)
    request = engine.add(make_request(0, 12, 3))
    scheduler = engine.scheduler
    assert scheduler.commit(scheduler.schedule(0.0), [5], 1.0) == []
    assert request.num_computed_tokens == 8
    assert scheduler.commit(scheduler.schedule(1.0), [6], 2.0) == [request]
    assert scheduler.commit(scheduler.schedule(2.0), [7], 3.0) == [request]
    assert request.output_token_ids == [6, 7]
    assert (request.times.admitted_s, request.times.first_token_s) == (0.0, 2.0)
    with pytest.raises(ValueError, match="2 sampled tokens for a step of 1 chunks"):
        scheduler.commit(scheduler.schedule(3.0), [1, 2], 4.0)


def test_ids_models_and_formats_are_checked():
    scheduler = make_scheduler(make_kv(10))
    scheduler.add(make_request(0))
    with pytest.raises(RequestError, match="request_id='r0' is in use"):
        scheduler.add(make_request(0))
    with pytest.raises(ConfigError, match="model='x' is not served; the models are: m"):
        scheduler.add(make_request(1, model="x"))
    with pytest.raises(ConfigError, match="kv_precision='fp8' is not served by m; use fp32, bf16"):
        scheduler.add(make_request(1, kv="fp8"))


def test_a_request_that_cannot_fit_alone_is_an_error_of_the_engine_not_an_endless_wait():
    scheduler = make_scheduler(make_kv(2))
    scheduler.add(make_request(0, 4000, 1))
    with pytest.raises(RuntimeError, match="must refuse requests that do not fit alone"):
        scheduler.schedule(0.0)


def test_the_scheduler_learns_from_the_steps_it_is_told_of():
    engine = FakeEngine(make_kv(40))
    engine.add(make_request(0))
    output = engine.step()
    engine.scheduler.observe(output, 0.5)
    assert engine.scheduler.profiles[MODEL].num_observed == 1


def test_a_narrowed_request_that_fits_only_in_one_format_is_computed_again():
    """Eight bf16 pages fill the four slabs; one of them in int8 takes a slab of its own."""
    engine = FakeEngine(make_kv(4), preemption="swap", narrow_keep_pages=100)
    request = engine.add(make_request(0, prompt=13, output=19, min_kv_precision="int8"))
    engine.step()
    narrowing = engine.kv.next_requantization(request, most=1, keep_pages=0)
    assert engine.kv.requantize_pages(request, narrowing) == 1
    engine.drain()
    assert request.finish_reason is FinishReason.LENGTH
    assert request.num_preemptions == 1
    check_tokens(request)
