"""The picture that `fineserve-jax slabs` draws, with matplotlib."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.recording import Header, RecordEntry

COLOURS = ("#e8e8e8", "#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#bab0ac")
"""Of free slabs, and of pools in the order of their numbers, over and over."""
MAP_COLUMNS = 64
MIB = 2**20


def colour(number: int) -> str:
    """Of the pool with that number; 0: free slabs."""
    return COLOURS[0] if number == 0 else COLOURS[1 + (number - 1) % (len(COLOURS) - 1)]


def format_colours(header: Header, entries: Sequence[RecordEntry]) -> dict[str, str]:
    """Colour of each KV format that holds anything in some entry: that of its first pool."""
    used = sorted({name for entry in entries for name in entry.formats})
    owners = [pool.rpartition("/")[2] for pool in header.pools]
    numbers = {name: owners.index(name) if name in owners else index for index, name in enumerate(used)}
    return {name: colour(1 + numbers[name]) for name in sorted(used, key=numbers.__getitem__)}


def busiest(entries: Sequence[RecordEntry]) -> RecordEntry:
    """The entry with the most slabs in use."""
    return max(entries, key=lambda entry: np.count_nonzero(entry.slab_map[:, 0]))


def needed(entry: RecordEntry) -> int:
    """Bytes of all cached tokens."""
    return sum(part[0] for part in entry.formats.values())


def reserved(entry: RecordEntry) -> int:
    """Bytes set aside for them."""
    return sum(part[1] for part in entry.formats.values())


def draw_picture(header: Header, entries: Sequence[RecordEntry], path: Path) -> None:
    """Writes the PNG.

    Raises:
        ConfigError: matplotlib is missing, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "drawing a PNG needs matplotlib, which is not installed; pip install 'fineserve-jax[plot]', or give "
            "--page-only for the HTML page alone"
        ) from None
    figure = Figure(figsize=(11, 10), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(4, 1, height_ratios=(3, 2, 2, 3))
    _occupancy(axes[0], header, entries)
    _fragmentation(axes[1], entries)
    _counts(axes[2], entries)
    _map(axes[3], header, busiest(entries))
    for plot in axes[:3]:
        plot.spines[["top", "right"]].set_visible(False)
        plot.set_xlim(entries[0].step, max(entries[-1].step, entries[0].step + 1))
    axes[2].set_xlabel("step")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from None


def _occupancy(axes: Any, header: Header, entries: Sequence[RecordEntry]) -> None:
    steps, colours = [entry.step for entry in entries], format_colours(header, entries)
    layers = [[entry.formats.get(name, (0, 0, 0))[1] / MIB for entry in entries] for name in colours]
    idle = [sum(part[2] for part in entry.formats.values()) / MIB for entry in entries]
    labels, shades = [*colours, "kept for prefixes"], [*colours.values(), "#c8c8c8"]
    axes.stackplot(steps, *layers, idle, labels=labels, colors=shades)
    axes.plot(steps, [needed(entry) / MIB for entry in entries], color="black", linewidth=1, label="needed")
    axes.axhline(header.usable_bytes / MIB, color="0.5", linewidth=0.8, linestyle=":")
    axes.set(ylabel="reserved, MiB", ylim=(0, 1.05 * header.usable_bytes / MIB))
    axes.set_title(f"memory by KV format; policy: {header.policy}", fontsize=10, loc="left")
    axes.legend(frameon=False, fontsize=8, ncols=len(labels) + 1, loc="lower right", bbox_to_anchor=(1, 1))


def _fragmentation(axes: Any, entries: Sequence[RecordEntry]) -> None:
    shown = [entry for entry in entries if needed(entry)]
    axes.plot([e.step for e in shown], [reserved(e) / needed(e) for e in shown], color=colour(1), linewidth=1)
    axes.set(ylabel="reserved / needed", ylim=(1, None))
    requests = axes.twinx()
    requests.plot([e.step for e in entries], [e.running for e in entries], color=colour(3), linewidth=1)
    requests.set_ylabel("requests running", color=colour(3))
    requests.spines["top"].set_visible(False)


def _counts(axes: Any, entries: Sequence[RecordEntry]) -> None:
    steps = [entry.step for entry in entries]
    names = [name for name in entries[-1].counts if not name.endswith("_tokens") and entries[-1].counts[name]]
    for index, name in enumerate(names):
        axes.plot(steps, [entry.counts[name] for entry in entries], color=colour(1 + index), label=_words(name))
    axes.set(ylabel="since the start", ylim=(0, None))
    if names:
        axes.legend(frameon=False, fontsize=8, loc="upper left")
    else:
        axes.text(0.5, 0.5, "no page was moved, converted, narrowed or evicted", transform=axes.transAxes, ha="center")


def _map(axes: Any, header: Header, entry: RecordEntry) -> None:
    """A square a slab, filled from below by the part of its pages that is in use."""
    slabs = entry.slab_map
    rows = -(-len(slabs) // MAP_COLUMNS)
    for index, (pool, used) in enumerate(slabs.tolist()):
        x, y = index % MAP_COLUMNS, index // MAP_COLUMNS
        axes.bar(x, 0.9, width=0.9, bottom=rows - 1 - y, color=colour(0))
        if pool:
            axes.bar(x, 0.9 * used / 255, width=0.9, bottom=rows - 1 - y, color=colour(pool))
    present = sorted({pool for pool in slabs[:, 0].tolist() if pool})
    handles = [axes.bar(0, 0, color=colour(pool), label=header.pools[pool - 1]) for pool in present]
    axes.set_axis_off()
    axes.set(xlim=(-0.6, MAP_COLUMNS - 0.4), ylim=(-0.1, rows))
    axes.set_title(
        f"map of the arena after step {entry.step}: {len(slabs)} slabs of {header.slab_bytes / MIB:.1f} MiB, filled as "
        "far as their pages are in use",
        fontsize=10,
        loc="left",
    )
    if handles:
        axes.legend(handles=handles, frameon=False, fontsize=8, ncols=6, loc="upper center", bbox_to_anchor=(0.5, 0.0))


def _words(name: str) -> str:
    return name.replace("_", " ")
