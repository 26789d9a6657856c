"""Very many rows: the job's memory does not grow with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "batch_rows.py"


@pytest.mark.slow
@pytest.mark.parametrize("ordered", [False, True])
def test_a_million_rows_take_less_than_300_mib_beside_the_engine(ordered):
    command = [sys.executable, BENCHMARK, "--rows", "1000000", *(["--ordered"] if ordered else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=BENCHMARK.parents[1])
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak_above_engine_mib"] < 300
    assert result["rows_per_cpu_s"] > 10_000  # half of what is wanted of a machine with nothing else to do
