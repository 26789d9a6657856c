"""Jobs on a real engine with a tiny model, reproducible and without timing, in processes of their own, to be killed."""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tiny_model import OPTIONS

from fineserve_jax import Engine, EngineConfig
from fineserve_jax.engine.stats import EngineStats
from fineserve_jax.entrypoints.batch import BatchSummary, JobObserver, run_batch
from fineserve_jax.loaders import load_model

CONFIG = EngineConfig(**{**OPTIONS, "kv_precision": "int8", "kv_formats": ["int8", "bf16"], "reproducible": True})


def write_rows(path: Path, count: int, longest: int) -> None:
    """Rows of all sorts: greedy and random, with log-probabilities, samples and formats, OpenAI's, and a bad one."""
    with path.open("w") as file:
        for number in range(count):
            fields: dict[str, Any] = {"prompt": f"row {number}" + number % 40 * "x", "ignore_eos": True}
            fields |= {"max_tokens": longest // 2 + number % (longest // 2), "temperature": (0.0, 1.0, 0.7)[number % 3]}
            if number % 10 == 3:
                fields |= {"logprobs": 2, "kv_precision": "bf16"}
            if number % 10 == 7:
                fields["n"] = 2
            if number % 10 == 9:
                row = {"custom_id": f"row {number}", "method": "POST", "url": "/v1/completions", "body": fields}
            else:
                row = {"id": number} | ({"prompt": 5} if number % 50 == 49 else fields)
            file.write(json.dumps(row) + "\n")


class Log(JobObserver):
    """Takes down in a file how many tokens the engine has sampled, after every step, which then takes longer."""

    def __init__(self, path: Path, step_s: float) -> None:
        self._file, self._step_s, self._seen = os.open(path, os.O_WRONLY | os.O_CREAT), step_s, 0

    def step(self, summary: BatchSummary, stats: EngineStats) -> None:
        if summary.sampled_tokens != self._seen:
            self._seen = summary.sampled_tokens
            os.pwrite(self._file, b"%12d" % self._seen, 0)
            time.sleep(self._step_s)


def answer(model: Path, source: Path, target: Path, log: Path, step_s: float, resume: bool) -> None:
    """Answers a file as the command does, and exits with 3 if it was interrupted, else with 0."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, open as long as the process
    summary = run_batch(
        "tiny",
        source,
        target,
        CONFIG,
        make_engine=lambda: Engine(load_model(model, OPTIONS["weights"]), CONFIG),
        resume=resume,
        ordered=True,
        timing=False,
        observers=[Log(log, step_s)],
    )
    os._exit(3 if summary.interrupted else 0)
