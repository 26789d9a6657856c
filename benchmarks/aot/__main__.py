"""The command line: see the package's docstring."""

import logging
import os
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from benchmarks.aot.fingerprint import ENVIRONMENT as STABLE
from benchmarks.aot.logs import log_from

# Before jax is imported. XLA must not look for a GPU to time kernels on, nor JAX mind that there is none.
ENVIRONMENT = {
    "gpu": {"XLA_FLAGS": "--xla_gpu_autotune_level=0", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1"} | STABLE,
    "tpu": {"JAX_PLATFORMS": "cpu"} | STABLE,
}
SAVED = Path("benchmarks/aot/saved")


def main(
    job: Annotated[Literal["gpu", "tpu", "report"], tyro.conf.Positional],
    only: str = "",
    everything: Annotated[bool, tyro.conf.arg(name="all")] = False,
    full: bool = False,
    folder: Path = SAVED,
    docs: Path = Path("docs/aot.md"),
    verbose: bool = False,
) -> int:
    """Compiles the kernels for chips that are not there, those that have changed since the results were saved.

    Args:
        job: gpu, tpu: compile for that platform and save the results; report: print what was saved, write it down.
        only: compile just the cases whose title (operation, model, formats) contains this.
        everything: compile also what has not changed.
        full: compile formats by themselves for every model; takes twice as long.
        folder: where results are and will be saved, as JSON.
        docs: where the report goes.
        verbose: show why a case failed in full.
    """
    log_from(logging.DEBUG if verbose else logging.CRITICAL)
    return _report(folder, docs) if job == "report" else _compile(job, only, everything, full, folder)


def _compile(job: Literal["gpu", "tpu"], only: str, everything: bool, full: bool, folder: Path) -> int:
    os.environ |= ENVIRONMENT[job]
    from benchmarks.aot import results
    from benchmarks.aot.matrix import all_cases, in_order
    from benchmarks.aot.run import run

    console, started, path = Console(width=160), time.perf_counter(), folder / f"{job}.json"
    saved = {result.key: result for result in results.load(path)} if path.exists() else {}
    cases, found = all_cases(job, full), dict(saved)
    chosen = [case for case in cases if only in case.title]
    num_found = num_compiled = 0
    for result in run(job, chosen, {} if everything else saved, full):
        same = not everything and result.is_of_same_program(saved.get(result.key))
        num_found, num_compiled = num_found + 1, num_compiled + (not same)
        found[result.key] = result
        results.save(in_order(found, job, cases), path)
        state = "; ".join(result.problems()) or "ok"
        spent = "unchanged" if same else f"{result.compile_s:.1f} s"
        console.print(f"{' '.join(result.key)}: {spent}, {state[:600]}", highlight=False, markup=False)
    seconds = time.perf_counter() - started
    console.print(f"{num_found} programs, {num_compiled} of them compiled, in {seconds:.0f} s")
    return 0


def _report(folder: Path, docs: Path) -> int:
    from benchmarks.aot import results, table

    saved = [result for path in sorted(folder.glob("*.json")) for result in results.load(path)]
    console = Console(width=None if sys.stdout.isatty() else 220)
    if not saved:
        console.print(f"no results in {folder}; compile first, as `make aot` does")
        return 1
    table.show(saved, console)
    docs.write_text(table.markdown(saved))
    problems = table.problem_lines(saved)
    for line in (*table.remark_lines(saved), *problems):
        console.print(line, highlight=False, markup=False)
    console.print(f"{len(saved)} programs, {len(problems)} errors; {docs} written")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
