"""The page that `fineserve-jax slabs` writes: one HTML file, drawn by its own script, that needs no network."""

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fineserve_jax.entrypoints.cli.slab_picture import colour, format_colours, needed, reserved
from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.recording import Header, RecordEntry

MOST_ENTRIES = 600
"""Entries that the page holds; of longer records evenly spread ones."""
PLACE = "/*DATA*/null"


def write_page(header: Header, entries: Sequence[RecordEntry], path: Path) -> None:
    """Writes the page. Raises ConfigError if the file cannot be written."""
    template = resources.files("fineserve_jax.entrypoints.cli").joinpath("slab_page.html").read_text()
    data = json.dumps(page_data(header, entries), separators=(",", ":")).replace("<", "\\u003c")
    try:
        path.write_text(template.replace(PLACE, data))
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from None


def page_data(header: Header, entries: Sequence[RecordEntry]) -> dict[str, Any]:
    """What the script draws."""
    stride = -(-len(entries) // MOST_ENTRIES)
    shown = entries[::-stride][::-1]  # the last one is always there
    colours = format_colours(header, shown)
    return {
        "policy": header.policy,
        "slabBytes": header.slab_bytes,
        "usableBytes": header.usable_bytes,
        "pools": [{"name": name, "colour": colour(number)} for number, name in enumerate(header.pools, start=1)],
        "formats": [{"name": name, "colour": shade} for name, shade in colours.items()],
        "steps": [entry.step for entry in shown],
        "times": [entry.time_s for entry in shown],
        "running": [entry.running for entry in shown],
        "waiting": [entry.waiting for entry in shown],
        "reserved": {name: [entry.formats.get(name, (0, 0, 0))[1] for entry in shown] for name in colours},
        "cached": [sum(part[2] for part in entry.formats.values()) for entry in shown],
        "needed": [needed(entry) for entry in shown],
        "ratio": [reserved(entry) / needed(entry) if needed(entry) else None for entry in shown],
        "counts": {name: [entry.counts[name] for entry in shown] for name in shown[-1].counts},
        "maps": [entry.slabs for entry in shown],
    }
