"""Narrowing in place of waiting and of preemption, through the scheduler."""

import pytest
from scheduler_cases import FakeEngine, make_kv, make_request

COUNT, PROMPT, OUTPUT = 12, 48, 32
SLABS_IN_BF16 = COUNT * (PROMPT + OUTPUT) // 8  # of two pages of four tokens


def squeezed(load: float, **settings) -> FakeEngine:
    """Serves requests that want `load` times the memory in bf16, a third of which may not be narrowed."""
    kv = make_kv(int(SLABS_IN_BF16 / load), reserve_slabs=2)
    engine = FakeEngine(kv, max_chunk_tokens=PROMPT, max_batch_size=COUNT, **settings)
    for number in range(COUNT):
        floor = "int4" if number % 3 else None
        engine.add(make_request(number, PROMPT, OUTPUT, min_kv_precision=floor))
    return engine


def test_requests_that_wait_are_admitted_once_others_can_be_narrowed():
    engine = squeezed(load=2)
    engine.step()
    at_first = engine.scheduler.num_running
    for _ in range(COUNT):
        engine.step()
    assert engine.scheduler.num_running >= at_first + 3
    assert engine.kv.num_narrowed_pages


@pytest.mark.parametrize("most_moved", [1 << 30, 16], ids=["", "little is moved in a step"])
def test_nobody_is_preempted_while_pages_can_be_narrowed(most_moved):
    """Growing rows leave free slabs alone that narrowing needs to start with."""
    engine = squeezed(load=1.6)
    engine.kv.pool.compaction.max_step_bytes = most_moved
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_nothing_is_narrowed_for_a_request_that_would_not_fit_anyway():
    kv = make_kv(40, reserve_slabs=2)
    engine = FakeEngine(kv, max_batch_size=COUNT)
    for number in range(2):
        engine.add(make_request(number, PROMPT, OUTPUT, min_kv_precision="int8"))
    engine.add(make_request(2, PROMPT, OUTPUT))
    for _ in range(10):
        engine.step()
    waiting = engine.add(make_request(3, 4 * PROMPT, OUTPUT))
    for _ in range(10):
        engine.step()
    assert waiting not in kv.requests
    assert kv.num_narrowed_pages == 0
