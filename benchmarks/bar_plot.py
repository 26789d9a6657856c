"""Plots of a few figures side by side."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def draw_bars(values: Mapping[str, Mapping[str, float]], y_label: str, path: Path) -> None:
    """Groups of bars.

    Args:
        values: group -> bar -> its height; every group has the same bars.
    """
    bars = list(next(iter(values.values())))
    figure, axes = plt.subplots(figsize=(1.4 + 0.5 * len(values) * (1 + len(bars)), 3.6), layout="constrained")
    for number, bar in enumerate(bars):
        places = [group + (number - (len(bars) - 1) / 2) * 0.8 / len(bars) for group in range(len(values))]
        drawn = axes.bar(places, [heights[bar] for heights in values.values()], 0.76 / len(bars), label=bar)
        axes.bar_label(drawn, fmt="%.4g", fontsize=8)
    axes.set_xticks(range(len(values)), list(values))
    axes.set(ylabel=y_label)
    axes.spines[["top", "right"]].set_visible(False)
    if len(bars) > 1:
        axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)
