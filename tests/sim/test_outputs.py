"""What a simulation writes: a trace, a report that opens offline, figures; and the command that does it."""

import itertools
import json
import re
import xml.etree.ElementTree as ET

import pytest
from sim_cases import cluster, workload

from fineserve_jax.entrypoints.cli import main
from fineserve_jax.sim import get_system
from fineserve_jax.sim.charts import distribution, line_chart
from fineserve_jax.sim.experiment import Experiment
from fineserve_jax.sim.report import report
from fineserve_jax.sim.trace_output import write_trace


@pytest.fixture(scope="module")
def results():
    experiment = Experiment(workload(rate=15.0, seconds=8.0), cluster(3e9))
    return experiment.run_all([get_system("fineserve"), get_system("uniform")], [0.5, 1.0], record_steps=True)


def test_the_trace_has_every_step_and_every_request_in_its_phases(results, tmp_path):
    result = results[1]
    write_trace(tmp_path / "trace.json", result.run, result.system)
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    steps = [event for event in spans if event["pid"] == 1]
    assert sum(event["args"]["steps"] for event in steps) == result.run.num_steps
    for before, after in itertools.pairwise(steps):
        assert before["ts"] + before["dur"] <= after["ts"] + 0.01
    for phase in ("waits", "prefill", "decode"):
        assert sum(event["name"].endswith(phase) for event in spans) == len(result.run.requests)
    assert {event["name"] for event in events if event["ph"] == "C"} == {"KV memory reserved, GB", "requests"}
    assert all(event.get("dur", 0.0) >= 0.0 for event in events)


def test_the_report_loads_nothing_and_has_every_system_at_every_rate(results):
    page = report(results, "a <title>")
    assert "a &lt;title&gt;" in page
    assert not re.search(r"(src|href)=|@import|<script|url\(", page)
    assert page.count("<tr>") == 1 + len(results)
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 9
    for chart in charts:
        texts = [element.text for element in ET.fromstring(chart).iter("{http://www.w3.org/2000/svg}text")]
        assert {"fineserve", "uniform"} <= set(texts)


def test_a_report_of_the_same_runs_is_the_same_to_the_byte(results):
    again = Experiment(workload(rate=15.0, seconds=8.0), cluster(3e9))
    repeated = again.run_all([get_system("fineserve"), get_system("uniform")], [0.5, 1.0])
    assert report(repeated, "t") == report(results, "t")


@pytest.mark.parametrize("lines", [{}, {"one": [(1.0, 0.0)]}, {"a": [(0.1, 5.0), (100.0, 2.0)], "b": []}])
@pytest.mark.parametrize("log_x", [False, True])
def test_charts_are_well_formed_whatever_they_show(lines, log_x):
    points = [
        float(number)
        for element in ET.fromstring(line_chart("t", "x", "y", lines, log_x=log_x)).iter()
        for number in re.findall(r"-?[\d.]+(?:e-?\d+)?", element.get("points", ""))
    ]
    assert all(0.0 <= number <= 460.0 for number in points)


def test_a_distribution_rises_to_one():
    points = distribution([3.0, 1.0, 2.0])
    assert points[0] == (1.0, pytest.approx(1 / 3))
    assert points[-1] == (3.0, 1.0)
    assert distribution([]) == []


WORK = ["--rate", "5", "--seconds", "4", "--kv-memory", "4GB"]


def test_the_command_writes_what_it_is_asked_for_and_the_same_again(tmp_path, capsys):
    names = ("report.html", "trace.json", "figures.json")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths = [str(tmp_path / folder / name) for name in names]
        outputs = [
            word for flag, path in zip(("--html", "--perfetto", "--json"), paths, strict=True) for word in (flag, path)
        ]
        assert main(["simulate", *WORK, "--system", "fineserve", "--system", "prism", *outputs]) == 0
    assert "fineserve" in capsys.readouterr().out
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    figures = json.loads((tmp_path / "one" / "figures.json").read_text())
    assert [row["system"] for row in figures] == ["fineserve", "prism"]


def test_the_command_replays_traces_with_a_policy_from_outside(tmp_path):
    trace = tmp_path / "trace.csv"
    rows = [f"{i * 0.1},{100 + i},{5 + i}" for i in range(20)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    output = tmp_path / "figures.json"
    policy = "fineserve_jax.scheduler.policies:sjf"
    words = ["simulate", "--trace", str(trace), "--mix", "llama-3.1-8b@awq/int4", "--mix", "llama-3.1-8b/bf16=2"]
    assert main([*words, "--policy", policy, "--rate-scale", "2", "--json", str(output)]) == 0
    assert {row["num_done"] for row in json.loads(output.read_text())} == {20}


def test_prefixes_in_a_workload_are_shared(tmp_path):
    path, output = tmp_path / "work.jsonl", tmp_path / "figures.json"
    common = {"prompt_tokens": 1200, "output_tokens": 4, "prefix": 1, "prefix_tokens": 1100}
    path.write_text("\n".join(json.dumps({"arrival_s": float(i)} | common) for i in range(5)))
    ttft = {}
    for flags in ((), ("--prefix-cache",)):
        words = ["simulate", "--trace", str(path), "--mix", "llama-3.1-8b/bf16", "--system", "fineserve", *flags]
        assert main([*words, "--json", str(output)]) == 0
        ttft[flags] = json.loads(output.read_text())[0]["ttft"]["p50"]
    assert ttft[("--prefix-cache",)] < 0.5 * ttft[()]


def test_launches_one_by_one_hold_up_what_is_read_faster(tmp_path):
    """32 layers of Llama-3.1-8B whose kernels take 500 us each to launch: no token comes faster than every 16 ms."""
    output, tpot = tmp_path / "figures.json", {}
    for flags in ((), ("--layer-overhead-us", "500")):
        words = ["simulate", *WORK, "--mix", "llama-3.1-8b@awq/bf16", "--system", "fineserve", *flags]
        assert main([*words, "--json", str(output)]) == 0
        tpot[flags] = json.loads(output.read_text())[0]["tpot"]["p50"]
    assert tpot[()] < 0.008
    assert 0.016 <= tpot["--layer-overhead-us", "500"] < 0.02


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix", "llama-3.1-8b"], "mix 'llama-3.1-8b': write MODEL"),
        (["--mix", "llama-3.1-8b/int9"], "KV format 'int9' is not known; choose one of"),
        (["--system", "vllm"], "system='vllm' is not known; choose from fineserve, uniform"),
        (["--device", "b300"], "device='b300' is not known; choose one of h100"),
        (["--kv-memory", "lots"], "kv_memory='lots' is not a size"),
        (["--kv-memory", "1MB"], "a slab takes"),
        (["--device", "l4", "--mix", "llama-3.1-70b/bf16"], "more than 1 x l4 has"),
        (["--table", "none.csv"], "none.csv is no table of measured costs"),
        (["--step-profile", "none.json"], "cannot read the step profile none.json"),
        (["--html", "nowhere/report.html"], "html='nowhere/report.html' cannot be written: there is no folder"),
        (["--json", "/"], "json='/' cannot be written; name a file"),
        (["--layer-overhead-us", "-1"], "layer_overhead_us=-1 is no time; give 0 or more microseconds"),
        (["--step-profile", "none.json", "--layer-overhead-us", "9"], "leave out --layer-overhead-us"),
    ],
)
def test_what_cannot_be_simulated_is_refused(words, message, capsys):
    assert main(["simulate", "--rate", "5", "--seconds", "2", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("xs", [(0.0066, 0.0069), (0.004, 0.03), (0.001, 90.0)])
def test_a_logarithmic_axis_has_numbers_however_short_it_is(xs):
    chart = ET.fromstring(line_chart("t", "x", "y", {"a": [(x, 1.0) for x in xs]}, log_x=True))
    texts = chart.iter("{http://www.w3.org/2000/svg}text")
    numbers = [float(text.text) for text in texts if text.get("y") == "242.0"]
    assert len(numbers) >= 3
    assert all(xs[0] * 0.999 <= number <= xs[1] * 1.001 for number in numbers)
