"""The command line: see the package's docstring."""

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from tools.gpu_session.jobs import Job, Outcome, run_jobs

WRONG_IF_NOT_OK = ("kernels", "generation")


@dataclasses.dataclass(frozen=True)
class Arguments:
    output: Path = Path("gpu_session.json")
    seconds: float = 520.0
    """For all jobs together."""
    model: str | None = None
    """File or directory of a real model; none: random weights, and no budget of a step."""
    only: tuple[str, ...] = ()
    """Names of jobs; none: all."""
    dry_run: bool = False
    """On this machine's CPU, with little of everything."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=sys.modules["tools.gpu_session"].__doc__)
    jobs = jobs_of(arguments)
    if unknown := set(arguments.only) - {job.name for job in jobs}:
        sys.exit(f"--only {min(unknown)}: no job is called so; there are {', '.join(job.name for job in jobs)}")
    if arguments.only:
        jobs = [job for job in jobs if job.name in arguments.only]

    def note(outcomes: Mapping[str, Outcome]) -> None:
        name, last = list(outcomes.items())[-1]
        print(f"{name}: {last.status}, {last.seconds:.0f} s", file=sys.stderr, flush=True)
        written = {name: dataclasses.asdict(outcome) for name, outcome in outcomes.items()}
        arguments.output.write_text(json.dumps(written, indent=1) + "\n")

    outcomes = run_jobs(jobs, arguments.seconds, {"JAX_PLATFORMS": "cpu"} if arguments.dry_run else {}, note)
    show(outcomes)
    return 1 if any(name in outcomes and outcomes[name].status != "ok" for name in WRONG_IF_NOT_OK) else 0


def jobs_of(arguments: Arguments) -> list[Job]:
    """The jobs, what matters most first; each has more time than it should need."""
    python, dry = sys.executable, arguments.dry_run
    attention = [python, "benchmarks/attention.py"]
    serving = [python, "-m", "tools.gpu_session.serving"]
    model = ["--model", arguments.model] if arguments.model else []
    few = ["--kv-precisions", "int8", "--layers", "2"] if dry else []
    small = ["--rows", "2", "--prompt-tokens", "32", "--new-tokens", "4", "--rounds", "1"] if dry else []
    jobs = [
        Job("kernels", [*attention, "--no-timings", *(["--head-dims", "64"] if dry else [])], 150),
        Job("generation", [*serving, *model, *few, "--no-timings"], 150),
    ]
    for tokens in (64,) if dry else (1024, 8192):
        size = ["--rows", "2", "--rounds", "2", "--calls", "2", "--cases", "bf16", "int8"] if dry else []
        jobs.append(Job(f"attention at {tokens}", [*attention, "--no-checks", "--tokens", str(tokens), *size], 90))
    jobs.append(Job("serving", [*serving, *model, *few, *small, "--no-checks"], 240))
    if arguments.model:
        for kv_precision in ("bf16", "int8", "bf16+int8+int4"):
            step = ["benchmarks/step_budget.py", *model, "--kv-precision", kv_precision, "--rows", "64"]
            jobs.append(Job(f"step, {kv_precision}", [python, *step, "--tokens", "512"], 90))
    return jobs


def show(outcomes: Mapping[str, Outcome]) -> None:
    """Prints how the jobs went, and the figures of those that have some."""
    console = Console(highlight=False)
    table = Table("job", "", "seconds", "figures")
    for name, outcome in outcomes.items():
        figures = "\n".join(_figures(outcome.result)) if outcome.status == "ok" else outcome.tail
        table.add_row(name, outcome.status, f"{outcome.seconds:.0f}", figures)
    console.print(table)


def _figures(result: Any) -> list[str]:
    """The lines that a job's result comes to."""
    lines = []
    for name, one in result.get("checks", {}).items():
        lines.append(f"{name}: log-probabilities within {one['largest_error']:.1e}, {one['compared']} tokens")
    for name, one in result.get("cases", {}).items():
        share = one["share_of_copy"]
        rate = one["bytes"] / one["seconds"] / 1e9
        lines.append(f"{name}: {rate:.1f} GB/s" + ("" if share is None else f", {share:.0%} of a copy's"))
    for name, one in result.get("serving", {}).items():
        decode, prefill = one["decode_tokens_per_s"], one["prefill_tokens_per_s"]
        lines.append(f"{name}: {decode:.0f} tokens a second decoding, {prefill:.0f} of prompts")
    if "ms" in result:
        lines.append(", ".join(f"{stage} {ms:.2f} ms" for stage, ms in result["ms"].items()))
    if "errors" in result:
        lines.append(f"{len(result['errors'])} operations are right")
    return lines


if __name__ == "__main__":
    sys.exit(main())
