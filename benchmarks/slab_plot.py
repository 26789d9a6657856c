"""The plot of `fragmentation.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def draw(runs: Mapping[str, Any], warm_up: int, steps: int, path: Path) -> None:
    """Reserved over cached bytes, and how full memory is, over the steps of each run."""
    figure, (above, below) = plt.subplots(2, 1, figsize=(9, 6.5), sharex=True, layout="constrained")
    for name, samples in runs.items():
        above.plot(samples.step, samples.reserved / samples.cached, label=name, linewidth=1.2)
        below.plot(samples.step, samples.cached / samples.usable, label=name, linewidth=1.2)
    for axes in (above, below):
        axes.axvspan(0, warm_up, color="0.93")
        axes.axvline(steps, color="0.6", linewidth=0.8, linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    above.set(yscale="log", ylim=(1, 4), ylabel="reserved / cached bytes")
    above.set_yticks([1.03, 1.1, 1.25, 1.5, 2, 3, 4], minor=False)
    above.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%.4g"))
    above.yaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    above.axhline(1.03, color="0.6", linewidth=0.8, linestyle=":")
    above.legend(frameon=False, fontsize=9)
    below.set(
        ylim=(0, 1), ylabel="cached, of the memory", xlabel="step (grey: warm-up; dotted: no more requests arrive)"
    )
    figure.savefig(path, dpi=110)
