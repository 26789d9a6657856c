"""One engine over several devices: `mesh_checks.py`, in a process whose CPU is 8 devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "mesh_checks.py"
DEVICES = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize("kind", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_engines_over_several_devices(kind):
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", "-m", kind, str(CHECKS)]
    done = subprocess.run(command, env=environment, cwd=CHECKS.parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
