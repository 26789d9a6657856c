"""What the scheduler learns and decides reaches the engine's callers."""

import json
import math
import time

import pytest

from fineserve_jax.errors import ConfigError, RequestError
from fineserve_jax.kv.integrity import check_integrity
from fineserve_jax.request.request import FinishReason
from fineserve_jax.request.request_options import RequestOptions
from fineserve_jax.request.sampling_params import SamplingParams


def test_a_request_that_asked_for_it_ends_as_late(make_engine):
    """Two requests for one place; the second's target passes while the first decodes."""
    now = [0.0]
    engine = make_engine(max_batch_size=1, clock=lambda: now[0])
    sampling = SamplingParams(max_tokens=6, ignore_eos=True)
    first = engine.add_request([5, 6, 7], sampling)
    late = engine.add_request([5, 6, 7], sampling, RequestOptions(ttft_slo_s=2.0, drop_when_late=True))
    kept = engine.add_request([5, 6, 7], sampling, RequestOptions(ttft_slo_s=2.0))
    returned = []
    while engine.has_unfinished:
        returned.append(engine.step())
        now[0] += 1.0
    assert [step.count(late) for step in returned].count(1) == 1  # told when it ends
    assert [request.finish_reason for request in (first, late, kept)] == ["length", "late", "length"]
    assert late.output_token_ids == []
    assert late.finish_reason is FinishReason.LATE
    check_integrity(engine.kv)


@pytest.mark.parametrize(
    ("targets", "error"),
    [
        ({"ttft_slo_s": 0.0}, r"ttft_slo_s=0\.0 is no latency target; give seconds, more than 0"),
        ({"ttft_slo_s": 10**400}, r"ttft_slo_s=10+(\.\.\.)?0* is no latency target"),
        ({"tpot_slo_s": math.nan}, r"tpot_slo_s=nan is no latency target"),
        ({"drop_when_late": True}, r"drop_when_late without a ttft_slo_s drops nothing"),
    ],
)
def test_targets_that_mean_nothing_are_refused(make_engine, targets, error):
    engine = make_engine()
    with pytest.raises(RequestError, match=error):
        engine.add_request([5, 6, 7], None, RequestOptions(**targets))
    assert not engine.has_unfinished


def test_a_step_is_observed_with_all_that_it_took(make_engine, monkeypatch):
    """Not only the time on the device: who predicts when tokens come needs the host's part, too."""
    engine, sampling = make_engine(), SamplingParams(max_tokens=4, ignore_eos=True)
    engine.warm_up()
    observed, next_step = [], engine.pipeline.next
    monkeypatch.setattr(engine.scheduler, "observe", lambda plan, seconds: observed.append(seconds))
    monkeypatch.setattr(engine.pipeline, "next", lambda now: (time.sleep(0.02), next_step(now))[1])
    engine.add_request([5, 6, 7], sampling)
    while engine.has_unfinished:
        engine.step()
    assert len(observed) == 4
    assert min(observed) >= 0.02


def test_learnt_step_times_are_kept_in_a_file(make_engine, tmp_path):
    path = tmp_path / "profile.json"
    for _ in range(2):
        engine = make_engine(step_profile=str(path))
        (before,) = (profile.num_observed for profile in engine.scheduler.profiles.values())
        for _ in range(2):  # the first compiles, which teaches nothing
            engine.add_request([5, 6, 7], SamplingParams(max_tokens=8, ignore_eos=True))
            while engine.has_unfinished:
                engine.step()
    assert before > 0
    (kept,) = json.loads(path.read_text()).values()
    assert kept["num_observed"] > before
    path.write_text(path.read_text().replace('"weight_bytes": ', '"weight_bytes": 1'))
    with pytest.raises(ConfigError, match=r"the step profile of .* was learnt with other weights"):
        make_engine(step_profile=str(path))
