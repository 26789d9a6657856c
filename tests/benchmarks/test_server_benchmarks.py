"""The benchmarks of a server under load run, for seconds and with a tiny model."""

import json
import sys

import numpy as np
import pytest
import slo_engine
import soak
from tiny_model import write_tiny_model

from fineserve_jax.sim.workload import Arrival

pytestmark = pytest.mark.slow


@pytest.fixture
def model(tmp_path, quick_compilation) -> str:
    return str(write_tiny_model(tmp_path / "tiny"))


def test_a_soak_loses_nothing_while_models_come_and_go_and_clients_leave(model):
    told = soak.soak(
        soak.Arguments(
            model,
            weights="fp32",
            second_weights="fp32",
            minutes=0.25,
            load=0.6,
            mix=("int8", "int4"),
            killed=0.3,
            changes_every_s=3.0,
            prompt_tokens=20,
            output_tokens=10,
            kv_memory="2MiB",
            max_batch_size=4,
            measured_requests=8,
        )
    )
    assert (told["lost"], told["books_are_exact"]) == (0, True), told
    assert told["outcomes"]["done"] > 20
    assert told["outcomes"]["left"] > 0
    assert told["model_changes"] >= 2  # it came, and went


def test_attainment_is_measured_and_simulated(model, monkeypatch, capsys):
    words = f"slo_engine.py --model {model} --weights fp32 --mix int8 int4 --systems fineserve uniform --loads 0.5"
    words += " --seconds 4 --learning-requests 6 --shorten 10 --max-seq-len 64 --kv-memory 1MiB --max-batch-size 4"
    monkeypatch.setattr(sys, "argv", [*words.split(), "--max-chunk-tokens", "32"])
    slo_engine.main()
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(one["system"], one["lost"]) for one in told["results"]] == [("fineserve", 0), ("uniform", 0)]
    for one in told["results"]:
        assert 0 <= one["attainment"] <= 1
        assert 0 <= one["simulated"] <= 1
        assert one["requests"]
    own, uniform = (one["attainment"] for one in told["results"])
    gain, load = (own / uniform, 0.5) if uniform else (None, None)  # a busy machine may be late with everything
    assert (told["lost"], told["at_load"], told["largest_gain_over_uniform"]) == (0, load, pytest.approx(gain))
    errors = [100 * abs(one["simulated"] - one["attainment"]) for one in told["results"]]
    assert told["worst_simulation_error_points"] == max(errors)


def test_a_trace_keeps_its_course_at_any_rate():
    quiet, busy = [Arrival(t, 5, 5) for t in np.arange(0, 1800, 18.0)], np.arange(1800, 3601, 2.0)
    trace = quiet + [Arrival(t, 5, 5) for t in busy]
    drawn = slo_engine.shaped_as(trace, rate=5.0, seconds=100.0, seed=0)
    assert len(drawn) == 500
    times = np.array([arrival.arrival_s for arrival in drawn])
    assert (np.diff(times) > 0).all()
    assert 0 <= times[0] < times[-1] <= 100
    assert 25 < (times < 50).sum() < 75  # a tenth of the trace's requests come in the first half of its time
    with pytest.raises(SystemExit, match="are 2000, and the trace has 1001"):
        slo_engine.shaped_as(trace, rate=20.0, seconds=100.0, seed=0)
