"""Other projects' interfaces are tested with the tiny model of the batch jobs."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "batch"))
