"""Benchmarks as scripts import each other, and the batch tests' tiny model."""

import sys
from pathlib import Path

sys.path += [str(Path(__file__).parents[2] / folder) for folder in ("benchmarks", "tests/batch")]
