"""What is learnt of tenants, and what they are given."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from scheduler_cases import FakeEngine, make_kv, make_request

from fineserve_jax.errors import ConfigError
from fineserve_jax.scheduler import POLICIES, SchedulerConfig
from fineserve_jax.scheduler.lengths import OutputLengths
from fineserve_jax.scheduler.policies import find_policy
from fineserve_jax.scheduler.tenants import FairShares


def ended(number, tenant, length):
    request = make_request(number, 8, 1000, tenant=tenant)
    request.token_ids += [0] * length
    return request


def test_lengths_are_expected_as_the_tenant_has_shown_them():
    lengths, rng = OutputLengths(), np.random.default_rng(0)
    for number in range(200):
        lengths.observe(ended(number, "short", int(rng.poisson(20))))
        lengths.observe(ended(number, "long", int(rng.poisson(600))))
    expected = {name: lengths.expected(make_request(0, 8, 1000, tenant=name)) for name in ("short", "long", "new")}
    # The prior of 8 answers draws each towards everyone's mean.
    assert 20 < expected["short"] < 80
    assert 500 < expected["long"] < 600
    assert expected["short"] < expected["new"] < expected["long"]


def test_before_anything_has_ended_half_of_the_limit_is_expected():
    assert OutputLengths().expected(make_request(0, 8, 1000)) == 500


def test_a_tenant_that_changes_is_followed():
    lengths = OutputLengths()
    for length in (500, 10):
        for number in range(200):
            lengths.observe(ended(number, "a", length))
    assert lengths.expected(make_request(0, 8, 1000, tenant="a")) < 50


@given(st.lists(st.integers(1, 5000)), st.integers(1, 100), st.integers(0, 99))
def test_an_expectation_is_neither_more_than_allowed_nor_less_than_there_is(lengths_seen, limit, have):
    lengths, request = OutputLengths(), make_request(0, 8, limit)
    for number, length in enumerate(lengths_seen):
        lengths.observe(ended(number, "", length))
    request.token_ids += [0] * min(have, limit)
    assert max(1, request.num_output_tokens) <= lengths.expected(request) <= limit


def test_the_scheduler_learns_from_requests_that_end_and_not_from_aborted_ones():
    engine = FakeEngine(make_kv(40), policy="sjf", max_batch_size=1)
    for number in range(30):
        engine.add(make_request(number, 4, 2, tenant="brief"))
    engine.drain()
    brief, unknown = make_request(50, 4, 400, tenant="brief"), make_request(51, 4, 400, tenant="unknown")
    aborted = engine.add(make_request(52, 4, 40, tenant="aborted"))
    engine.step()
    engine.abort(aborted)
    lengths = engine.scheduler._lengths
    assert lengths.expected(brief) < lengths.expected(unknown)
    assert "aborted" not in lengths._by_tenant


# -- weighted tenants --------------------------------------------------------------------------------------------


@settings(max_examples=8)
@given(st.floats(0.25, 8.0), st.integers(1, 40), st.integers(1, 40))
def test_tenants_with_requests_waiting_are_admitted_work_in_proportion_to_their_weights(weight, length, other_length):
    weights = {"a": weight, "b": 1.0}
    engine = FakeEngine(make_kv(60), policy="tenants", max_batch_size=1, tenant_weights=weights)
    sizes = {"a": length, "b": other_length}
    for number in range(300):
        tenant = "ab"[number % 2]
        engine.add(make_request(number, sizes[tenant], 1, tenant=tenant))
    done = {"a": 0, "b": 0}
    while all(any(r.options.tenant == t and r.finish_reason is None for r in engine.requests) for t in "ab"):
        engine.step()
        if sum(done.values()) > 40 * (length + other_length):
            break
        done = {
            t: sum(sizes[t] + 1 for r in engine.requests if r.options.tenant == t and r.finish_reason) for t in "ab"
        }
    longest = max(sizes.values()) + 1
    # Fair queueing: never apart by more than a request of each, in work over weight.
    assert abs(done["a"] / weight - done["b"]) <= longest / weight + longest + 1e-9


def test_a_tenant_that_was_away_has_saved_nothing_up():
    shares = FairShares()
    for _ in range(10):
        shares.admitted(shares.tag("busy", 100.0))
    assert shares.tag("back", 100.0) == shares.tag("busy", 1.0) - 100.0


# -- policies from outside ---------------------------------------------------------------------------------------


def shortest_prompt(request, context):
    return request.num_prompt_tokens


def test_a_policy_is_found_by_name_by_place_and_by_entry_point(monkeypatch):
    assert find_policy("fcfs") is POLICIES["fcfs"]
    assert find_policy(f"{__name__}:shortest_prompt") is shortest_prompt

    class EntryPoint:
        def load(self):
            return shortest_prompt

    def entry_points(group, name):
        return [EntryPoint()] if (group, name) == ("fineserve_jax.policies", "offered") else []

    monkeypatch.setattr("importlib.metadata.entry_points", entry_points)
    assert find_policy("offered") is shortest_prompt
    assert SchedulerConfig(policy="offered").policy == "offered"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lifo", "unknown policy; the policies are: fineserve, fcfs, .*; or name a function as module:function"),
        ("no_such_module:f", "policy 'no_such_module:f' cannot be imported: No module named"),
        ("math:no_such", "policy 'math:no_such' cannot be imported: .*no_such"),
        ("math:pi", "policy 'math:pi' is 3.14.*, which is no function of a request and a PolicyContext"),
    ],
)
def test_a_policy_that_cannot_be_had_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        SchedulerConfig(policy=name)


def test_weights_that_are_none_are_refused():
    with pytest.raises(ConfigError, match=r"weight of tenant 'a' is 0\.0; give a positive number"):
        SchedulerConfig(policy="tenants", tenant_weights={"a": 0.0})


def test_least_slack_goes_by_deadline_less_the_time_it_takes():
    engine = FakeEngine(make_kv(90), policy="least_slack", max_batch_size=1, ageing_s=100.0, slo_aware=False)
    engine.add(make_request(0, 4, 2))
    engine.step()
    engine.add(make_request(1, 4, 2, ttft_slo_s=10.0))
    engine.add(make_request(2, 300, 2, "int8", ttft_slo_s=10.02))
    engine.add(make_request(3, 4, 2, ttft_slo_s=9.0))
    engine.drain()
    assert sorted(range(4), key=lambda i: engine.requests[i].times.admitted_s) == [0, 3, 2, 1]
