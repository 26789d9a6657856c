"""Level 2: what runs in a step, and how many prefill tokens ride along."""

import pytest
from scheduler_cases import COST, FORMATS, MODEL, PAGE_SIZE, ROOFLINE, FakeEngine, make_kv, make_request

from fineserve_jax.request.request import ScheduledChunk
from fineserve_jax.scheduler.costs import step_cost


def counts(output):
    return {scheduled.request.sequence: scheduled.count for scheduled in output.chunks}


def test_a_prompt_is_computed_in_chunks_of_whole_pages_and_a_rest():
    engine = FakeEngine(make_kv(40), max_chunk_tokens=8)
    engine.add(make_request(0, 18, 2))
    assert [counts(engine.step()) for _ in range(4)] == [{0: 8}, {0: 8}, {0: 2}, {0: 1}]


def test_a_rest_of_one_token_is_a_decode_row():
    engine = FakeEngine(make_kv(40), max_chunk_tokens=8)
    request = engine.add(make_request(0, 9, 2))
    engine.step()
    assert engine.step().decodes == (ScheduledChunk(request, 8, 1),)
    assert request.num_output_tokens == 1


def test_chunks_of_several_requests_share_a_step_in_whole_pages():
    engine = FakeEngine(make_kv(40), max_chunk_tokens=16, policy="fcfs")
    for number, prompt in enumerate([5, 3, 30]):
        engine.add(make_request(number, prompt, 2))
    assert counts(engine.step()) == {0: 5, 1: 3, 2: 4}


def test_decodes_go_on_while_a_long_prompt_is_computed():
    engine = FakeEngine(make_kv(80), max_chunk_tokens=8, policy="fcfs")
    engine.add(make_request(0, 4, 9))
    engine.step()
    engine.add(make_request(1, 30, 2))
    assert [counts(engine.step()) for _ in range(4)] == [
        {0: 1, 1: 8},
        {0: 1, 1: 8},
        {0: 1, 1: 8},
        {0: 1, 1: 6},
    ]


def test_without_chunks_a_prompt_is_one_however_long():
    engine = FakeEngine(make_kv(80), max_chunk_tokens=8, chunked_prefill=False, policy="fcfs")
    for number, prompt in enumerate([4, 30, 3, 3]):
        engine.add(make_request(number, prompt, 1, arrival=number - 3.0))
    assert [counts(engine.step()) for _ in range(3)] == [{0: 4}, {1: 30}, {2: 3, 3: 3}]


def test_of_equals_the_shorter_prompt_goes_first():
    engine = FakeEngine(make_kv(40), max_chunk_tokens=4, policy="fcfs")
    engine.add(make_request(0, 12, 1))
    engine.add(make_request(1, 4, 1))
    assert counts(engine.step()) == {1: 4}


def decoding_with_a_prompt_waiting(target_s, **settings):
    """Four rows decode 32 tokens deep, and a prompt of 400 has been admitted; the next output and its
    prediction."""
    engine = FakeEngine(make_kv(200), **{"max_chunk_tokens": 256, "policy": "fcfs"} | settings)
    for number in range(4):
        engine.add(make_request(number, 32, 50, tpot_slo_s=target_s))
    for _ in range(2):
        engine.step(target_s or 1.0)  # neither ahead of the target nor behind
    engine.add(make_request(9, 400, 2, "int8"))
    output = engine.step()
    return output, engine.scheduler.profiles[MODEL].predict(step_cost(output.chunks, FORMATS))


def test_without_a_target_the_chunk_is_as_long_as_allowed():
    output, _ = decoding_with_a_prompt_waiting(None)
    assert [chunk.count for chunk in output.prefills] == [256]


def test_the_chunk_is_the_longest_that_keeps_the_tightest_target():
    """Against trying every length: the roofline predicts 21 ms for the weights and 0.2 ms a token past the
    knee."""
    lengths = []
    for target_s in (0.022, 0.026, 0.03, 0.04, 0.1):
        output, predicted = decoding_with_a_prompt_waiting(target_s)
        (chunk,) = output.prefills
        assert predicted <= target_s
        profile = FakeEngine(make_kv(2)).scheduler.profiles[MODEL]
        a_page_more = (*output.decodes, ScheduledChunk(chunk.request, 0, chunk.count + PAGE_SIZE))
        assert chunk.count == 256 or profile.predict(step_cost(a_page_more, FORMATS)) > target_s
        lengths.append(chunk.count)
    assert lengths == sorted(set(lengths))


def test_a_target_that_leaves_no_room_holds_prefill_back():
    decodes_alone, _ = decoding_with_a_prompt_waiting(0.0215, max_batch_size=5, chunked_prefill=False)
    assert len(decodes_alone.decodes) == 4
    assert decodes_alone.prefills == ()


@pytest.mark.parametrize(("chunked", "count"), [(True, PAGE_SIZE), (False, 400)])
def test_a_target_out_of_reach_lets_the_least_chunk_go_along(chunked, count):
    output, predicted = decoding_with_a_prompt_waiting(0.001, chunked_prefill=chunked)
    assert predicted > 0.001
    assert [chunk.count for chunk in output.prefills] == [count]


def test_the_tightest_target_counts_and_only_that_of_decoding_rows():
    output, _ = decoding_with_a_prompt_waiting(0.04)
    engine = FakeEngine(make_kv(200), max_chunk_tokens=256, policy="fcfs")
    for number, target_s in enumerate([None, 0.04, 1e9, 1.0]):
        engine.add(make_request(number, 32, 50, tpot_slo_s=target_s))
    for _ in range(2):
        engine.step(0.04)
    engine.add(make_request(9, 400, 2, "int8", tpot_slo_s=0.001))
    assert engine.step().prefills[0].count == output.prefills[0].count


def test_a_row_ahead_of_its_target_lends_its_time_to_prefill_and_one_behind_takes_some():
    """Against the time to the moment when the fourth token is due, and three quarters of the target."""

    def prefill_after(step_s, target_s=0.04):
        engine = FakeEngine(make_kv(200), max_chunk_tokens=400, policy="fcfs")
        engine.add(make_request(0, 32, 50, tpot_slo_s=target_s))
        for _ in range(3):
            engine.step(step_s)
        engine.add(make_request(9, 400, 2, "int8"))
        output = engine.step()
        return output.prefills[0].count, engine.scheduler.profiles[MODEL].predict(step_cost(output.chunks, FORMATS))

    (behind, short), (neither, even), (ahead, long) = (prefill_after(step_s) for step_s in (0.06, 0.04, 0.03))
    assert behind < neither < ahead
    assert 0.029 < short <= 0.75 * 0.04 < even <= 0.04 < long <= 0.06


def test_targets_do_not_hold_prefill_back_where_they_are_not_to_count():
    output, _ = decoding_with_a_prompt_waiting(0.022, slo_aware=False)
    assert [chunk.count for chunk in output.prefills] == [256]


def test_step_cost_counts_tokens_pairs_and_bytes_read():
    decode, first, second = make_request(0, 11), make_request(1, 8, kv="int8"), make_request(2, 30, kv="int4")
    chunks = [ScheduledChunk(decode, 10, 1), ScheduledChunk(first, 0, 8), ScheduledChunk(second, 4, 8)]
    cost = step_cost(chunks, COST.formats)
    assert cost.tokens == 17
    assert cost.chunk_pairs == sum(range(1, 9)) + sum(range(5, 13))
    assert cost.kv_bytes == 10 * 4000 + 4 * 1000
    assert step_cost(chunks[:1], FORMATS) + step_cost(chunks[1:], FORMATS) == cost


def test_roofline_and_cases_agree_on_the_fixed_time():
    profile = FakeEngine(make_kv(2)).scheduler.profiles[MODEL]
    assert profile.predict(step_cost((), FORMATS)) == pytest.approx(0.021)
    assert profile.knee_tokens == pytest.approx(
        COST.weight_bytes / ROOFLINE.bandwidth / (COST.flops_per_token / ROOFLINE.flops)
    )
