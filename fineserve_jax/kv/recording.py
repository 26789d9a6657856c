"""A record of a run: how the memory was divided and used, step by step, for `fineserve-jax slabs`.

A file of JSON lines. The first says how the arena is divided; each further one is an `RecordEntry`.
"""

import base64
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fineserve_jax.errors import ConfigError
from fineserve_jax.kv.manager import KVManager
from fineserve_jax.kv.usage import count_events, measure_usage

VERSION = 1
KIND = "fineserve-jax slabs"


@dataclasses.dataclass(frozen=True)
class Header:
    """The arena.

    Attributes:
        kind, version: tell such a file from others.
        policy: how slabs are shared out.
        slab_bytes, usable_bytes: of a slab, and of all that can be handed out.
        pools: name of each pool, in the order of their numbers, from 1 on; 0 stands for free slabs.
    """

    kind: str
    version: int
    policy: str
    slab_bytes: int
    usable_bytes: int
    pools: list[str]


@dataclasses.dataclass(frozen=True)
class RecordEntry:
    """The memory after a step.

    Attributes:
        step, time_s: which step, and when by the engine's clock.
        running, waiting: requests with memory, and without.
        formats: by KV format, bytes needed by cached tokens, reserved for them, and kept for their prefix.
        counts: what was done with pages since the start, by name; see `KVCounts`. And preempted requests.
        slabs: base64 of two bytes a slab: the number of its pool, and which part of its pages is in use, of 255.
    """

    step: int
    time_s: float
    running: int
    waiting: int
    formats: dict[str, tuple[int, int, int]]
    counts: dict[str, int]
    slabs: str

    @property
    def slab_map(self) -> np.ndarray:
        """u8[slabs, 2]: number of the pool, and part in use."""
        return np.frombuffer(base64.b64decode(self.slabs), np.uint8).reshape(-1, 2)


class Recorder:
    """Writes a record, an entry at a time.

    Args:
        path: the file; a record that is there is replaced.
        kv: whose memory.
        every: steps from one entry to the next.

    Raises:
        ConfigError: a file that cannot be written, or that is something else.
    """

    def __init__(self, path: Path, kv: KVManager, every: int) -> None:
        self._path, self._kv, self._every = path, kv, every
        if path.exists() and path.stat().st_size and not _is_record(path):
            raise ConfigError(f"{path} is there already and is no record of a run; name another file to record to")
        allocator = kv.pool.allocator
        header = Header(
            kind=KIND,
            version=VERSION,
            policy=type(allocator.policy).__name__.lower(),
            slab_bytes=allocator.slab_units * allocator.unit_bytes,
            usable_bytes=allocator.usable_slabs * allocator.slab_units * allocator.unit_bytes,
            pools=["/".join(name) for name in allocator.pools],
        )
        try:
            path.write_text(json.dumps(dataclasses.asdict(header)) + "\n")
        except OSError as error:
            raise ConfigError(f"cannot record to {path}: {error}") from None

    def note(self, step: int, time_s: float, running: int, waiting: int, counts: Mapping[str, int]) -> None:
        """A step has been computed; `counts` are told besides those of the pages."""
        if step % self._every:
            return
        usage = measure_usage(self._kv)
        entry = RecordEntry(
            step=step,
            time_s=round(time_s, 4),
            running=running,
            waiting=waiting,
            formats={
                name: (part.needed_bytes, part.reserved_bytes, part.cached_bytes)
                for name, part in usage.formats.items()
                if part.reserved_bytes or part.cached_bytes
            },
            counts={**dataclasses.asdict(count_events(self._kv)), **counts},
            slabs=base64.b64encode(_slab_map(self._kv).tobytes()).decode(),
        )
        with self._path.open("a") as file:
            file.write(json.dumps(dataclasses.asdict(entry)) + "\n")


def read_record(path: Path) -> tuple[Header, list[RecordEntry]]:
    """A record; a last line that was cut off is left out.

    Raises:
        ConfigError: a file that cannot be read, is no record, or has no entries.
    """
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from None
    if not _is_record(path):
        raise ConfigError(f"{path} is no record of a run; make one with `fineserve-jax batch --record {path.name} ...`")
    header: dict[str, Any] = json.loads(lines[0])
    if header["version"] != VERSION:
        raise ConfigError(f"{path} is a record of version {header['version']}; this program reads version {VERSION}")
    entries = [
        RecordEntry(**json.loads(line)) for line in lines[1:-1]
    ]  # behind the last newline is nothing, or a piece
    if not entries:
        raise ConfigError(f"{path} holds no step; record a run of at least one")
    return Header(**header), entries


def _is_record(path: Path) -> bool:
    with path.open(errors="replace") as file:
        try:
            first = json.loads(file.readline())
        except ValueError:
            return False
    return isinstance(first, dict) and first.get("kind") == KIND


def _slab_map(kv: KVManager) -> np.ndarray:
    """u8[slabs, 2], the null page's slab left out."""
    allocator = kv.pool.allocator
    pools = np.frombuffer(bytes(allocator.slab_pools), np.uint8)
    free = np.array(allocator.slab_free, np.float64)
    capacity = np.ones(256)
    for pool in allocator.pools.values():
        capacity[pool.number] = pool.capacity
    used = np.where(pools > 0, 1 - free / capacity[pools], 0)
    return np.stack([pools, np.ceil(255 * used).astype(np.uint8)], axis=1)[1:]
