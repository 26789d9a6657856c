"""A plan over several devices: `device_checks.py`, in a process whose CPU is 4 devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = Path(__file__).parent / "device_checks.py"
DEVICES = "--xla_force_host_platform_device_count=4"


@pytest.mark.slow
def test_engines_on_devices_of_their_own():
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "pytest", "-q", str(CHECKS)]
    done = subprocess.run(command, env=environment, cwd=CHECKS.parents[2], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
