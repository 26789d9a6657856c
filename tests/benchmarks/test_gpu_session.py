"""The session on a machine with a GPU: its jobs keep to their time, and all of it runs dry on a CPU."""

import json
import subprocess
import sys

import pytest

from tools.gpu_session.__main__ import Arguments, jobs_of
from tools.gpu_session.gather import names_of, needs
from tools.gpu_session.jobs import LEAST_S, Job, Outcome, run_jobs


def job(name: str, script: str, most_s: float = 20.0) -> Job:
    return Job(name, [sys.executable, "-c", script], most_s)


def run(*jobs: Job, seconds: float = 60.0) -> dict[str, Outcome]:
    return run_jobs(jobs, seconds, {"MARK": "7"}, lambda outcomes: None)


def test_a_job_that_fails_or_hangs_costs_the_others_nothing():
    outcomes = run(
        job("hangs", "print('before', flush=True); import time; time.sleep(60)", most_s=0.5),
        job("fails", "print('{\"a\": 1}'); raise SystemExit(3)"),
        job("says nothing", "pass"),
        job("is well", "import os, json; print('noise'); print(json.dumps({'mark': os.environ['MARK']}))"),
    )
    assert {name: one.status for name, one in outcomes.items()} == {
        "hangs": "too long",
        "fails": "failed",
        "says nothing": "failed",
        "is well": "ok",
    }
    assert outcomes["hangs"].tail == "before"
    assert outcomes["fails"].result == {"a": 1}
    assert outcomes["is well"].result == {"mark": "7"}


def test_no_job_is_begun_without_time():
    outcomes = run(job("late", "print('{}')"), seconds=LEAST_S / 2)
    assert outcomes["late"].status == "no time left"


def test_all_jobs_fit_the_time_that_there_is():
    """What a job should need is well under what it may take; the time for all of them leaves room for the start."""
    assert Arguments().seconds < 9 * 60
    names = [one.name for one in jobs_of(Arguments(model="model.gguf"))]
    assert names[:2] == ["kernels", "generation"]
    assert len(set(names)) == len(names)


def test_what_is_there_is_not_gathered():
    assert names_of(["ml_dtypes==0.5", "Flax>=0.12,<0.13", "# a comment", "orbax.checkpoint"]) == {
        "ml-dtypes",
        "flax",
        "orbax-checkpoint",
    }
    assert any(need.startswith("flax") for need in needs({"jax"}))
    assert not any(need.startswith("flax") for need in needs({"jax", "flax"}))


@pytest.mark.slow
def test_a_dry_run_is_right_about_everything(tmp_path):
    output = tmp_path / "session.json"
    command = [sys.executable, "-m", "tools.gpu_session", "--dry-run", "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    outcomes = json.loads(output.read_text())
    assert {name: one["status"] for name, one in outcomes.items()} == dict.fromkeys(
        ("kernels", "generation", "attention at 64", "serving"), "ok"
    )
    assert outcomes["serving"]["result"]["serving"]["int8"]["output_tokens_per_s"] > 0
