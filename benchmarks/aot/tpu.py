"""Compiles for TPUs that are not there: Pallas through Mosaic to machine code."""

import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.aot.cases import Case
from benchmarks.aot.fingerprint import fingerprint
from benchmarks.aot.results import Kernel, Result
from benchmarks.aot.targets import Target

# libtpu reads these: there is no machine to ask, and nothing on it to lock.
ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}
PACKAGES = ("jax", "jaxlib", "libtpu")
READERS = ("tpu.py",)
KERNEL = re.compile(r"^\s*(?:ROOT )?%([\w.-]+) = .*custom_call_target=\"tpu_custom_call\".*$", re.MULTILINE)
VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"')


class TpuCompiler:
    """The compiler for one TPU."""

    def __init__(self, target: Target) -> None:
        os.environ |= ENVIRONMENT
        self.target = target
        topology = topologies.get_topology_desc(target.topology, "tpu")
        self.mesh = Mesh([topology.devices[0]], ("x",))
        self.sharding = NamedSharding(self.mesh, PartitionSpec())

    def fingerprint(self, case: Case) -> str:
        """Of what `compile` would be given; see `fingerprint`."""
        return fingerprint([self._lower(case).as_text()], self.target, PACKAGES, READERS)

    def compile(self, case: Case) -> Result:
        """Compiles a case. Raises whatever the compilers do."""
        started = time.perf_counter()
        compiled = self._lower(case).compile()
        compile_s = time.perf_counter() - started
        memory = compiled.memory_analysis()
        return case.result(
            self.target.name,
            compile_s=compile_s,
            kernels=tuple(parse_hlo(compiled.as_text())),
            temp_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
        )

    def _lower(self, case: Case) -> Any:
        with jax.sharding.set_mesh(self.mesh):  # where Pallas looks up which TPU it lowers for
            return case.jitted(self.sharding).lower(*case.arguments)


def parse_hlo(text: str) -> list[Kernel]:
    """The Pallas kernels of a compiled program, and the vector memory that each takes."""
    kernels = []
    for match in KERNEL.finditer(text):
        used = VMEM.search(match[0])
        kernels.append(Kernel(match[1], vmem_bytes=int(used[1]) if used else 0))
    return kernels
