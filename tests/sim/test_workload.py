"""Workloads are read as they are written and drawn as they are described."""

import json

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from fineserve_jax.errors import ConfigError
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.sim import Arrival, Kind, assign, draw, read_csv, read_jsonl, scale_rate


def kind_of(kv_precision, share=1.0, **others):
    return Kind(share, RequestOptions(model="m", kv_precision=kv_precision, **others))


def test_a_trace_with_azures_columns_is_read_from_its_first_arrival_on(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n"
        "2023-11-16 18:17:04.9799600,110,27\n2023-11-16 18:17:03.4799600,4808,10\n2023-11-16 18:18:03.4799600,0,3\n"
    )
    arrivals = read_csv(path)
    assert [arrival.arrival_s for arrival in arrivals] == pytest.approx([0.0, 1.5, 60.0], abs=1e-6)
    assert [(a.prompt_tokens, a.output_tokens) for a in arrivals] == [(4808, 10), (110, 27), (1, 3)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "must have rows with the columns TIMESTAMP, ContextTokens, GeneratedTokens"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1.0,many,2\n", "holds a value that cannot be read"),
    ],
)
def test_a_file_that_is_no_trace_is_refused(tmp_path, text, message):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_csv(path)


def test_jsonl_lines_may_say_everything_about_a_request(tmp_path):
    path = tmp_path / "work.jsonl"
    lines = [
        {"arrival_s": 2.0, "prompt_tokens": 5, "output_tokens": 7, "kv_precision": "int4", "tenant": "a"},
        {"arrival_s": 1.0, "prompt_tokens": 3, "output_tokens": 4},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    kinds = [kind_of("bf16", ttft_slo_s=1.0)]
    second, first = read_jsonl(path, kinds, 0)
    assert (first.kv_precision, first.options.tenant, first.model, first.options.ttft_slo_s) == ("int4", "a", "m", 1.0)
    assert (second.kv_precision, second.arrival_s) == ("bf16", 1.0)
    path.write_text('{"arrival_s": 1.0, "tokens": 3}')
    with pytest.raises(ConfigError, match=r"line 1: .*tokens.*a line may have arrival_s, prompt_tokens"):
        read_jsonl(path, kinds, 0)


def test_options_of_a_line_beat_those_of_its_kind_and_the_rest_is_the_kinds(tmp_path):
    path = tmp_path / "work.jsonl"
    lengths = {"prompt_tokens": 5, "output_tokens": 7}
    lines = [
        {"arrival_s": 0.0, "drop_when_late": True, "priority": -1, "tenant": "", "tpot_slo_s": None, **lengths},
        {"arrival_s": 1.0, "ttft_slo_s": 3.0, **lengths},
        {"arrival_s": 2.0, **lengths},
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    common = {"tenant": "a", "ttft_slo_s": 1.0, "tpot_slo_s": 0.1}
    kind = kind_of("bf16", **common)
    first, second, third = (arrival.options for arrival in read_jsonl(path, [kind], 0))
    assert first == kind_of("bf16", drop_when_late=True, priority=-1, **common).options
    assert (second.ttft_slo_s, second.tpot_slo_s, second.drop_when_late) == (3.0, 0.1, False)
    assert third is kind.options


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0: input should be greater than or equal to 1"),
        ({"arrival_s": "soon"}, "arrival_s='soon': input should be a valid number"),
        ({"ttft_slo_s": -1}, "ttft_slo_s=-1 is no latency target; give seconds, more than 0, or none"),
        ({"tokens": 3}, "unknown setting 'tokens'"),
        ({"drop_when_late": True}, "drop_when_late without a ttft_slo_s drops nothing"),
        ({"min_kv_precision": "int4"}, "min_kv_precision='int4': narrowing is not simulated; leave it out"),
    ],
)
def test_a_line_with_a_bad_value_is_refused_by_file_and_number(tmp_path, values, message):
    path = tmp_path / "work.jsonl"
    good = {"arrival_s": 0.0, "prompt_tokens": 5, "output_tokens": 7}
    path.write_text("\n".join(map(json.dumps, (good, good | values))))
    with pytest.raises(ConfigError, match=f"{path}, line 2: {message}"):
        read_jsonl(path, [kind_of("bf16")], 0)


@settings(max_examples=30)
@given(st.floats(0.5, 20.0), st.sampled_from([0.5, 1.0, 4.0]), st.integers(0, 2**32 - 1))
def test_drawn_arrivals_are_in_order_within_the_time_and_the_same_for_a_seed(rate, burstiness, seed):
    arrivals = draw(rate, 30.0, seed, burstiness=burstiness)
    times = [arrival.arrival_s for arrival in arrivals]
    assert times == sorted(times)
    assert all(0.0 <= time < 30.0 for time in times)
    assert arrivals == draw(rate, 30.0, seed, burstiness=burstiness)
    assert all(4 <= arrival.prompt_tokens <= 2048 and 4 <= arrival.output_tokens <= 2048 for arrival in arrivals)


@pytest.mark.parametrize("burstiness", [0.5, 1.0, 3.0])
def test_gaps_have_the_rate_and_the_burstiness_asked_for(burstiness):
    gaps = np.diff([arrival.arrival_s for arrival in draw(10.0, 2000.0, 3, burstiness=burstiness)])
    assert gaps.mean() == pytest.approx(0.1, rel=0.1)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness, rel=0.1)


def test_kinds_get_their_shares_whatever_the_rate():
    arrivals = draw(50.0, 100.0, 1)
    dealt = assign(arrivals, [kind_of("bf16", 3.0), kind_of("int4", 1.0)], 1)
    assert sum(a.kv_precision == "bf16" for a in dealt) / len(dealt) == pytest.approx(0.75, abs=0.03)
    faster = scale_rate(dealt, 2.0)
    assert [a.kv_precision for a in faster] == [a.kv_precision for a in dealt]
    assert faster[-1].arrival_s == dealt[-1].arrival_s / 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: draw(0.0, 1.0, 0), "rate=0.0 of a drawn workload; give a positive number"),
        (lambda: scale_rate([], -1.0), "rate scale -1.0; give a positive number"),
        (lambda: assign([Arrival(0.0, 1, 1)], [], 0), "give at least one kind"),
    ],
)
def test_what_cannot_be_drawn_is_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        wrong()
