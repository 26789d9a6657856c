"""Compiles for NVIDIA GPUs that are not there: Pallas through Triton to PTX, and PTX through ptxas."""

import re
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.aot.cases import Case
from benchmarks.aot.fingerprint import fingerprint
from benchmarks.aot.programs import arena_operands
from benchmarks.aot.ptx import Resources, parse_ptx, parse_ptxas
from benchmarks.aot.results import Kernel, Result
from benchmarks.aot.targets import Target

# Width of a load in bytes -> how many; and by kernel, the loads of the arena and all others.
Widths = Counter[int]
Split = dict[str, tuple[Widths, Widths]]
PACKAGES = ("jax", "jaxlib", "jax-cuda12-pjrt", "jax-cuda12-plugin")
READERS = ("gpu.py", "ptx.py", "programs.py")
LAUNCH = re.compile(r"\bk\w*Kernel\b.*?\]\s+([\w$.]+) grid: .*shared_memory: (\d+) bytes")


class GpuCompiler:
    """The compiler for one GPU."""

    known_page_loads: ClassVar[dict[str, tuple[dict[str, Widths], dict[str, Widths]]]] = {}

    def __init__(self, target: Target) -> None:
        _load_plugin()
        self.target = target
        topology = topologies.get_topology_desc(
            platform="cuda", topology_name=target.topology, topology="1x1x1", target_config=target.config
        )
        self.sharding = NamedSharding(Mesh([topology.devices[0]], ("x",)), PartitionSpec())
        self.ptxas = find_ptxas()
        self.ptxas_version = subprocess.run(
            [self.ptxas, "--version"], capture_output=True, text=True, check=True
        ).stdout

    def fingerprint(self, case: Case) -> str:
        """Of what `compile` would be given; see `fingerprint`."""
        cases = [case] if case.without_scales is None else [case, case.without_scales]
        lowered = [case.jitted(self.sharding).trace(*case.arguments).lower().as_text() for case in cases]
        return fingerprint(lowered, self.target, PACKAGES, READERS, [self.ptxas_version])

    def compile(self, case: Case) -> Result:
        """Compiles a case. Raises whatever the compilers do."""
        with tempfile.TemporaryDirectory() as folder:
            dump = Path(folder)
            started = time.perf_counter()
            jaxpr, compiled = self._compile(case, dump)
            compile_s = time.perf_counter() - started
            ptx = [text for path in sorted(dump.glob("*.ptx")) if (text := path.read_text())]
            launches = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
        resources: dict[str, Resources] = {}
        for text in ptx:
            resources |= parse_ptxas(self._run_ptxas(text))
        shared = {name: int(size) for name, size in LAUNCH.findall(launches)}
        arenas = arena_operands(jaxpr.jaxpr, case.arena_size)
        split = _split_loads(ptx, arenas)
        pages = self._page_loads(case, arenas, split) if case.reads_pages else {}
        kernels = [
            Kernel(
                name,
                resources[name].registers,
                resources[name].spill_bytes,
                max(shared.get(name, 0), resources[name].shared_bytes),
                dict(sorted(of_arena.items())),
                dict(sorted(pages[name].items())) if name in pages else None,
                dict(sorted(others.items())),
            )
            for name, (of_arena, others) in split.items()
        ]
        memory = compiled.memory_analysis()
        return case.result(
            self.target.name,
            compile_s=compile_s,
            kernels=tuple(kernels),
            temp_bytes=memory.temp_size_in_bytes,
            code_bytes=memory.generated_code_size_in_bytes,
        )

    def _compile(self, case: Case, dump: Path) -> tuple[Any, Any]:
        traced = case.jitted(self.sharding).trace(*case.arguments)
        return traced.jaxpr, traced.lower().compile(compiler_options={"xla_dump_to": str(dump)})

    def _page_loads(self, case: Case, arenas: dict[str, set[int]], split: Split) -> dict[str, Widths]:
        """Of each kernel that reads the arena, the loads of keys and values.

        Chips whose kernels have the same loads share what was found out, as that takes another compilation.
        """
        of_arena = {name: loads for name, (loads, _) in split.items() if arenas[_base_name(name)]}
        if case.without_scales is None:
            return of_arena
        known, pages = self.known_page_loads.get(case.title, (None, {}))
        if known != of_arena:
            with tempfile.TemporaryDirectory() as folder:
                self._compile(case.without_scales, Path(folder))
                ptx = [path.read_text() for path in Path(folder).glob("*.ptx")]
            pages = {name: loads for name, (loads, _) in _split_loads(ptx, arenas).items() if name in of_arena}
            pages = {name: _within(loads, of_arena[name]) for name, loads in pages.items()}
            self.known_page_loads[case.title] = of_arena, pages
        return pages

    def _run_ptxas(self, ptx: str) -> str:
        command = [self.ptxas, "-v", f"-arch={self.target.arch}", "-", "-o", "/dev/null"]
        return subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr


def _load_plugin() -> None:
    """Makes the CUDA plugin known to JAX, which then finds no driver and says so; compiling needs none."""
    from jax._src import xla_bridge

    xla_bridge.backends()


def find_ptxas() -> str:
    """The path of ptxas, of the package nvidia-cuda-nvcc-cu12 or on the PATH.

    Raises:
        FileNotFoundError: there is none.
    """
    import nvidia  # type: ignore[import-not-found]

    for root in nvidia.__path__:
        for path in Path(root).glob("*/bin/ptxas"):
            return str(path)
    found = shutil.which("ptxas")
    if found is None:
        raise FileNotFoundError("ptxas was not found; install nvidia-cuda-nvcc-cu12, as the extra aot-gpu does")
    return found


def _base_name(name: str) -> str:
    """A kernel's own name: XLA numbers those that occur more than once."""
    return re.sub(r"__?\d+$", "", name)


def _split_loads(ptx: list[str], arenas: dict[str, set[int]]) -> Split:
    """Of each Pallas kernel, the loads of the arena and those of everything else."""
    split: Split = {}
    for name, kernel in ((name, kernel) for text in ptx for name, kernel in parse_ptx(text).items()):
        arena = arenas.get(_base_name(name))
        if arena is None:
            continue
        of_arena, others = split[name] = Counter(), Counter()
        for (argument, width), count in kernel.loads.items():
            (of_arena if arena and (argument is None or argument in arena) else others)[width] += count
    return split


def _within(pages: Widths, of_arena: Widths) -> Widths:
    """Page loads as the program without scales has them, where the program itself has them too.

    One that it has not must be among its narrowest.
    """
    found = pages & of_arena
    missing = sum((pages - of_arena).values())
    if missing:
        found[min(of_arena, default=1)] += missing
    return found
