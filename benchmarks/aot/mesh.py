"""A step over 8 chips that are not there: whether it compiles, what memory it takes, and what chips send each other.

    python -m benchmarks.aot.mesh gpu       for 8 H100s
    python -m benchmarks.aot.mesh tpu       for slices of 8 v5e and of 8 v6e

in the environments of `benchmarks.aot`, whose report shows what is found here, too.
"""

import functools
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from benchmarks.aot.fingerprint import ENVIRONMENT as STABLE
from benchmarks.aot.targets import MESH_TARGETS, Target

ENVIRONMENT = {
    "gpu": {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"} | STABLE,
    "tpu": {"JAX_PLATFORMS": "cpu"} | STABLE,
}
DTYPE_BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "f16": 2, "u16": 2, "s16": 2, "u8": 1, "s8": 1, "pred": 1}
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf"= (?P<result>.*?) (?P<name>{KINDS})(?P<start>-start)?\(")
ARRAY = re.compile(r"\b(\w+)\[([\d,]*)\]")


def collectives(hlo: str) -> dict[str, int]:
    """Bytes that each kind of collective of a compiled program gives a device, by the shapes of what it gives.

    One that is started and waited for names what it takes beside what it gives: that is counted once.
    """
    found: dict[str, int] = {}
    for match in COLLECTIVE.finditer(hlo):
        arrays = [(kind, shape) for kind, shape in ARRAY.findall(match["result"]) if kind in DTYPE_BYTES]
        if match["start"] and match["name"] != "all-reduce":
            arrays = arrays[len(arrays) // 2 :]
        size = sum(DTYPE_BYTES[kind] * math.prod(int(n) for n in shape.split(",") if n) for kind, shape in arrays)
        found[match["name"]] = found.get(match["name"], 0) + size
    return found


def mesh_of(target: Target) -> Any:
    """The chips as a mesh."""
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import Mesh

    from benchmarks.aot import gpu, tpu
    from fineserve_jax.models.layers import SHARDS

    if target.platform == "gpu":
        gpu._load_plugin()
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target.topology, topology="1x1x8", target_config=target.config
        )
    else:
        os.environ |= tpu.ENVIRONMENT | {"TPU_ACCELERATOR_TYPE": "v5litepod-8"}
        topology = topologies.get_topology_desc(target.topology, "tpu")
    return Mesh(np.array(topology.devices), (SHARDS,))


def main(
    platform: Annotated[Literal["gpu", "tpu"], tyro.conf.Positional],
    only: str = "",
    everything: Annotated[bool, tyro.conf.arg(name="all")] = False,
    folder: Path = Path("benchmarks/aot/saved"),
) -> int:
    """Compiles the stages of a step over 8 chips, those that have changed since the results were saved.

    Args:
        platform: gpu or tpu.
        only: compile just the stages whose title contains this.
        everything: compile also what has not changed.
        folder: where results are and will be saved, as JSON.
    """
    os.environ |= ENVIRONMENT[platform]
    from benchmarks.aot import results
    from benchmarks.aot.mesh_cases import mesh_cases

    path = folder / f"mesh-{platform}.json"
    known = {result.key: result for result in results.load(path)} if path.exists() and not everything else {}
    found = dict(known)
    for target in MESH_TARGETS[platform]:
        mesh = mesh_of(target)
        for case in mesh_cases(platform, mesh):
            if only not in case.title:
                continue
            result = _compile(target, mesh, case, known)
            found[result.key] = result
            results.save(found.values(), path)
            print(*result.key, result.collectives, case.collective_bytes, "; ".join(result.problems())[:600] or "ok")
    return 0


def _compile(target: Target, mesh: Any, case: Any, known: Mapping[tuple[str, str], Any]) -> Any:
    """The result of a stage; the known one if that is of the same program and compiler."""
    import jax

    from benchmarks.aot import gpu, tpu
    from benchmarks.aot.fingerprint import fingerprint
    from benchmarks.aot.results import Result
    from benchmarks.aot.step_cases import FORMATS

    made = functools.partial(Result, target.name, case.operation, case.model, "+".join(FORMATS), case.head_dim)
    packages = gpu.PACKAGES if target.platform == "gpu" else tpu.PACKAGES
    started = time.perf_counter()
    try:
        with jax.sharding.set_mesh(mesh) if target.platform == "tpu" else mesh:
            lowered = jax.jit(case.function, donate_argnums=case.donate).lower(*case.arguments)
            own = fingerprint([lowered.as_text()], target, packages, ("mesh.py", "tpu.py"))
            before = known.get(made().key)
            if before is not None and before.fingerprint == own:
                return before
            compiled = lowered.compile()
    except Exception as error:
        return made(error=f"{type(error).__name__}: {error}")
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    return made(
        compile_s=time.perf_counter() - started,
        kernels=tuple(tpu.parse_hlo(hlo)),
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        collectives=collectives(hlo),
        collectives_must=case.collective_bytes,
        fingerprint=own,
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
