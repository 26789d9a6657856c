"""The sides of the comparison: which engine, in which environment, reading which file, with what options."""

import dataclasses
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.peers.environments import python_of
from benchmarks.peers.model_files import checkpoint, requantized


@dataclasses.dataclass(frozen=True)
class Side:
    """An engine with its options.

    Attributes:
        name: what tables call it.
        engine: module of `benchmarks.peers.engines`.
        python: of the environment that it runs in.
        options: of the module's `start`.
        variables: of its process's environment, besides this one's.
    """

    name: str
    engine: str
    python: Path
    options: Mapping[str, Any]
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)


PEERS = {
    "vllm-eager": ("vllm", {"compiled": False}),
    "vllm-compiled": ("vllm", {"compiled": True}),
    "llama-q4_1": ("llama", {"cache_type": "f16"}),
    "llama-q8_0": ("llama", {"cache_type": "q8_0"}),
    "llama-bf16": ("llama", {"cache_type": "f16"}),
    "transformers": ("transformers", {}),
}
"""Of vLLM and transformers with bf16 weights and caches, of llama.cpp with weights in what the name says."""


def our_sides(cases: Iterable[str], model: str, limits: Mapping[str, int]) -> list[Side]:
    """Ours, a side for each case: weights/KV precision."""
    sides = []
    for case in cases:
        weights, slash, kv_precision = case.partition("/")
        if not slash:
            raise ValueError(f"--ours {case}: give weights and KV precision, such as int8/int8")
        options = {"model": model, "weights": weights, "kv_precision": kv_precision, **limits}
        sides.append(Side(f"ours {case}", "ours", Path(sys.executable), options))
    return sides


def peer_sides(wanted: Iterable[str], gguf: Path, limits: Mapping[str, int]) -> list[Side]:
    """The peers whose names begin as one of `wanted`, each in its environment.

    Raises:
        ValueError: one that no name begins with.
        RuntimeError: an environment or a file that cannot be made.
    """
    names = []
    for begin in wanted:
        found = [name for name in PEERS if name.startswith(begin)]
        if not found:
            raise ValueError(f"--peers {begin}: none is called so; there are {', '.join(PEERS)}")
        names += [name for name in found if name not in names]
    return [_peer(name, gguf, limits) for name in names]


def _peer(name: str, gguf: Path, limits: Mapping[str, int]) -> Side:
    engine, options = PEERS[name]
    if engine == "llama":
        file = {"file": str(requantized(gguf, name.partition("-")[2]))}
    else:
        file = {"checkpoint": str(checkpoint(gguf))}
    python = python_of(engine)
    return Side(name, engine, python, {**options, **file, **limits}, _variables(engine, python))


def _variables(engine: str, python: Path) -> dict[str, str]:
    """What an engine's own documentation advises: vLLM takes one thread unless it is told, and wants Intel's OpenMP."""
    if engine != "vllm":
        return {}
    advised = {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    openmp = python.parents[1] / "lib" / "libiomp5.so"
    return advised | ({"LD_PRELOAD": str(openmp)} if openmp.exists() else {})
