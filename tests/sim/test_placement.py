"""Placement: greedy search against the exhaustive one, estimates that move the right way, and refusals."""

import dataclasses
import json

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from fineserve_jax.entrypoints.cli import main
from fineserve_jax.errors import ConfigError
from fineserve_jax.sim import DEVICES
from fineserve_jax.sim.placement import (
    ModelLoad,
    Problem,
    Replica,
    estimate,
    exhaustive,
    greedy,
    prism,
    read_problem,
    slab_aware,
)

loads = st.builds(
    ModelLoad,
    model=st.sampled_from(["llama-3.1-8b", "llama-3.1-8b@fp8", "llama-3.1-8b@awq", "qwen-3-32b@awq", "smollm2-135m"]),
    kv_precision=st.sampled_from(["bf16", "fp8", "int4"]),
    rate=st.sampled_from([0.5, 4.0, 20.0, 60.0]),
    prompt_tokens=st.sampled_from([100, 1000]),
    output_tokens=st.sampled_from([50, 400]),
    ttft_slo_s=st.sampled_from([0.5, 2.0]),
    tpot_slo_s=st.sampled_from([0.03, 0.1]),
    tp=st.sampled_from([(1,), (1, 2)]),
)
devices = st.lists(st.sampled_from([DEVICES["h100"], DEVICES["a100"]]), min_size=2, max_size=3).map(tuple)
problems = st.builds(Problem, st.lists(loads, min_size=1, max_size=3).map(tuple), devices)


# Two models want both devices, and the one beside them must not have the faster.
TARGETS = {"ttft_slo_s": 0.5, "tpot_slo_s": 0.03}
EVERYWHERE_FIRST = Problem(
    (
        ModelLoad(model="llama-3.1-8b", rate=20.0, prompt_tokens=100, output_tokens=50, **TARGETS),
        ModelLoad(model="llama-3.1-8b", rate=60.0, prompt_tokens=100, output_tokens=400, **TARGETS),
        ModelLoad(model="llama-3.1-8b@awq", rate=4.0, prompt_tokens=1000, output_tokens=400, **TARGETS),
    ),
    (DEVICES["h100"], DEVICES["a100"]),
)


@settings(max_examples=40)
@given(problems)
@example(EVERYWHERE_FIRST)
def test_greedy_search_comes_near_the_best_placement(problem):
    """Within a twentieth, or a request in a hundred where hardly any can be in time."""
    try:
        _, best = exhaustive(problem)
    except ConfigError:
        return
    _, found = greedy(problem)
    assert 0.95 * best.in_time - 0.01 <= found.in_time <= best.in_time + 0.001


@settings(max_examples=40)
@given(problems)
def test_no_rule_of_others_beats_the_search(problem):
    _, best = exhaustive(problem)
    for rule in (prism, slab_aware):
        try:
            placement, found = rule(problem)
        except ConfigError:
            continue
        assert [replica.model for replica in placement].count(0) == 1
        assert found.in_time <= best.in_time + 0.001


@settings(max_examples=60)
@given(problems, st.floats(1.1, 5.0))
def test_more_requests_never_raise_the_share_in_time(problem, factor):
    placement, before = greedy(problem)
    models = tuple(load.model_copy(update={"rate": load.rate * factor}) for load in problem.models)
    after = estimate(dataclasses.replace(problem, models=models), placement)
    assert after.in_time <= before.in_time + 1e-9
    assert all(0.0 <= share <= 1.0 for share in after.attainment)
    assert all(sum(shares.values()) == pytest.approx(1.0) for shares in after.arena_shares if shares)


def test_a_busy_model_gets_more_replicas():
    load = ModelLoad(model="llama-3.1-8b", rate=100.0)
    placement, found = greedy(Problem((load,), (DEVICES["h100"],) * 3))
    assert sorted(replica.devices for replica in placement) == [(0,), (1,), (2,)]
    assert found.in_time > estimate(Problem((load,), (DEVICES["h100"],) * 3), placement[:1]).in_time


def test_a_model_too_large_for_one_device_is_divided():
    load = ModelLoad(model="llama-3.1-70b", rate=0.5, tp=(1, 2, 4))
    placement, _ = greedy(Problem((load,), (DEVICES["h100"],) * 4))
    assert {len(replica.devices) for replica in placement} <= {2, 4}


def test_the_slab_aware_rule_keeps_models_of_like_pages_together():
    """Pages of a model of 30 layers and of one of 32 have a long common multiple."""
    names = ["llama-3.1-8b@awq", "smollm2-135m", "llama-3.1-8b@fp8"]
    models = tuple(ModelLoad(model=name, rate=5.0 - i / 10) for i, name in enumerate(names))
    where = {r.model: r.devices for r in slab_aware(Problem(models, (DEVICES["h100"],) * 2))[0]}
    assert where[0] == where[2] != where[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("devices: [h100]", "must hold a list of `devices` and a list of `models`"),
        ("devices: [h1]\nmodels: [{model: llama-3.1-8b, rate: 1}]", "device='h1' is not known; choose one of h100"),
        ("devices: [h100]\nmodels: [{model: llama-3.1-8b}]", "rate=.*field required"),
        ("devices: [h100]\nmodels: [{model: llama-3.1-8b, rate: 0}]", "rate=0: .*greater than 0"),
        ("devices: [h100]\nmodels: [{model: x, rate: 1}]", "model 'x' has no known shape"),
        (
            "devices: [h100]\nmodels: [{model: llama-3.1-8b, rate: 1, tp: [2]}]",
            "tp=2 of llama-3.1-8b: .* has 1 devices",
        ),
        ("devices: [h100]\nmodels: [3]", "must be a mapping with `model` and `rate`"),
        ("devices: [h100]\nmodels: [{model: llama-3.1-70b, rate: 1}]", "141.1 GB of weights and do not fit"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_what_cannot_be_placed_is_refused(tmp_path, text, message):
    path = tmp_path / "workload.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        greedy(read_problem(path))


def test_too_many_placements_are_not_tried_one_by_one():
    load = ModelLoad(model="smollm2-135m", rate=1.0)
    with pytest.raises(ConfigError, match="placements are more than the 200000"):
        exhaustive(Problem((load,) * 6, (DEVICES["h100"],) * 4))


def test_the_command_says_where_models_go(tmp_path, capsys):
    path, output = tmp_path / "workload.yaml", tmp_path / "placement.json"
    path.write_text("devices: [h100, h100]\nmodels: [{model: llama-3.1-8b, rate: 5}, {model: qwen-3-32b@awq, rate: 2}]")
    assert main(["place", str(path), "--rule", "exhaustive", "--json", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "qwen-3-32b@awq" in shown
    written = json.loads(output.read_text())
    assert [len(model["replicas"]) > 0 for model in written["models"]] == [True, True]
    assert f"in time: {written['in_time_per_s']:.2f} of 7.00 requests/s" in shown
    assert estimate(
        read_problem(path),
        tuple(Replica(m, tuple(g)) for m, model in enumerate(written["models"]) for g in model["replicas"]),
    ).in_time_per_s == pytest.approx(written["in_time_per_s"])
