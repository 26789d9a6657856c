"""The simulator: nothing lost, the same bytes each time, and shortcuts that change nothing."""

import dataclasses
import json

import numpy as np
import pytest
from sim_cases import MODEL, cluster, options, simulate, workload

from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.scheduler import StepCost
from fineserve_jax.sim import SYSTEMS, Arrival, Kind, parse_model, summarize


def as_bytes(run):
    return json.dumps(dataclasses.asdict(run), default=RequestOptions.model_dump).encode()


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_request_is_accounted_for_and_all_memory_comes_back(system):
    arrivals = workload(seconds=10.0)
    run, kv = simulate(arrivals, system)
    check_integrity(kv)
    assert not kv.requests
    assert [one.arrival.arrival_s for one in run.requests] == [arrival.arrival_s for arrival in arrivals]
    assert {one.outcome for one in run.requests} <= {"length", "late"}
    for one in run.requests:
        if one.outcome == "length":
            assert one.arrival.arrival_s <= one.admitted_s < one.first_token_s <= one.finished_s <= run.end_s


def test_a_seed_gives_the_same_bytes_and_another_seed_others():
    first, again, other = (as_bytes(simulate(workload(seed=seed))[0]) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize("kv_bytes", [2e9, 40e9], ids=["short of memory", "plenty of memory"])
def test_runs_of_equal_steps_in_one_go_change_next_to_nothing(kv_bytes):
    """The few microseconds by which pages are moved together earlier or later; by them, a request may just make it into
    a step, or not."""
    arrivals = workload(rate=6.0)
    (fast, _), (slow, _) = (simulate(arrivals, where=cluster(kv_bytes), fast=fast, sample_s=1e9) for fast in (1, 0))
    assert fast.num_steps == slow.num_steps
    assert fast.num_preemptions == slow.num_preemptions
    times = [[(one.first_token_s, one.finished_s) for one in run.requests] for run in (fast, slow)]
    late_s = np.abs(np.subtract(*times)).max(axis=1)
    assert np.mean(late_s < 1e-4) >= 0.98
    assert late_s.max() < 2 * slow.end_s / slow.num_steps


@pytest.mark.parametrize("fast", [True, False])
def test_a_request_ends_at_its_deadline_however_many_steps_are_taken_in_one_go(fast):
    arrivals = [Arrival(1.0, 100, 4000, options("bf16", deadline_s=2.0)), Arrival(1.0, 100, 800, options("bf16"))]
    run, kv = simulate(arrivals, fast=fast)
    late, done = run.requests
    assert (late.outcome, late.in_time, done.outcome) == ("late", False, "length")
    assert 3.0 <= late.finished_s < 3.0 + 2 * done.end_to_end_s / 800
    assert not kv.requests


def test_a_lone_request_takes_the_time_that_the_cost_model_says():
    arrival = Arrival(1.0, 100, 5, options("bf16"))
    where = cluster()
    run, _ = simulate([arrival], where=where)
    cost = MODEL.cost(("bf16",), 16)
    timer = MODEL.roofline(where.device, where.efficiency)
    weights_s = cost.weight_bytes / timer.bandwidth + timer.overhead_s
    (one,) = run.requests
    assert one.ttft_s == pytest.approx(weights_s + 5050 * cost.flops_per_pair / timer.flops, rel=0.01)
    read = sum((100 + i) * cost.formats["bf16"].bytes_per_token for i in range(4)) / timer.bandwidth
    assert one.finished_s - one.first_token_s == pytest.approx(4 * weights_s + read, rel=1e-6)
    assert run.num_steps == 5


def test_a_measured_cost_model_takes_the_place_of_the_roofline():
    class Constant:
        def predict(self, cost: StepCost) -> float:
            return 0.25

    run, _ = simulate([Arrival(0.0, 100, 5, options("bf16"))], timers={MODEL.name: Constant()})
    assert run.requests[0].finished_s == pytest.approx(5 * 0.25)


def test_a_request_that_can_never_fit_is_refused_and_the_others_are_served():
    arrivals = [Arrival(0.0, 100_000, 5, options("bf16")), Arrival(0.0, 10, 5, options("bf16"))]
    run, _ = simulate(arrivals, where=cluster(2e9))
    assert [one.outcome for one in run.requests] == ["refused", "length"]


def test_models_share_a_device_and_its_memory():
    models = [parse_model("llama-3.1-8b"), parse_model("llama-3.1-8b@fp8"), parse_model("llama-3.1-8b@awq")]
    mix = [Kind(1.0, options("fp8", model, ttft_slo_s=2.0, tpot_slo_s=0.1)) for model in models]
    run, kv = simulate(workload(rate=6.0, mix=mix), where=cluster(models=models, formats=("fp8",)))
    assert {one.outcome for one in run.requests} == {"length"}
    check_integrity(kv)
    assert all(error < 0.05 for error in run.prediction_error.values())


def test_the_summary_adds_up():
    run, _ = simulate(workload(rate=20.0))
    summary = summarize(run)
    assert summary.num_done == summary.num_requests == len(run.requests)
    tokens = sum(one.arrival.output_tokens for one in run.requests)
    assert summary.output_tokens_per_s * summary.seconds == pytest.approx(tokens)
    assert summary.attainment == pytest.approx(sum(one.in_time for one in run.requests) / len(run.requests))
    assert summary.goodput_tokens_per_s <= summary.output_tokens_per_s
    assert summary.ttft.p50 <= summary.ttft.p90 <= summary.ttft.p99 <= summary.end_to_end.p99
    assert summary.reserved_over_needed >= 1.0
    json.dumps(summary.to_dict())
