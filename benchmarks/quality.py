"""Measures what KV formats, `auto` under pressure and narrow weights cost, for `docs/quality.md`.

    python benchmarks/quality.py --text wikitext2_valid.txt [--task gsm8k_test.jsonl] [--only formats ...]

Each run is one command, `fineserve-jax quality`. What it printed is written beside the page with the command, without
the folders of its files; then `docs/quality_page.py` writes the page anew, and the figures in README.md.
"""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "quality"
RUNS = {
    "formats": "--windows 24 --new-tokens 16 --kv-precision int8 --kv-precision int4 --plot {plot}",
    "more-formats": "--windows 24 --new-tokens 16 --kv-precision bf16 --kv-precision fp16 --kv-precision fp8 "
    "--kv-precision k8v4",
    "int3": "--windows 24 --new-tokens 16 --page-size 32 --kv-precision int3",
    "window-4096": "--window 4096 --windows 8 --new-tokens 16 --kv-precision int4",
    "window-8192": "--window 8192 --windows 8 --new-tokens 16 --kv-precision int4",
    "pressure": "--windows 24 --new-tokens 1 --kv-precision bf16 --pressure 2 --pressure 3",
    "weights": "--windows 24 --new-tokens 16 --kv-precision bf16 "
    "--other-weights bf16 --other-weights int8 --other-weights int4",
    "recall": "--windows 2 --new-tokens 1 --recall 2000 --questions 20 --kv-precision int8 --kv-precision int4",
    "task": "--windows 2 --new-tokens 1 --task {task} --questions 40 --task-tokens 160 "
    "--kv-precision int8 --kv-precision int4",
}


@dataclasses.dataclass(frozen=True)
class Arguments:
    text: Path
    """UTF-8 file, such as WikiText-2's validation set."""
    task: Path | None = None
    """Questions in GSM8K's form, for the run of that name."""
    only: tuple[str, ...] = tuple(RUNS)
    """Runs to make; those of before stay as they are."""
    model: str = "smollm2-135m"


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    if unknown := [name for name in arguments.only if name not in RUNS]:
        sys.exit(f"--only {unknown[0]}: there is no such run; the runs are {', '.join(RUNS)}")
    for name in arguments.only:
        if "{task}" in RUNS[name] and arguments.task is None:
            print(f"{name}: left out, as it needs --task", file=sys.stderr)
            continue
        print(f"{name}:", file=sys.stderr, flush=True)
        write_run(arguments, name)
    subprocess.run([sys.executable, ROOT / "docs" / "quality_page.py"], check=True)


def write_run(arguments: Arguments, name: str) -> None:
    """Makes a run, and writes what it printed."""
    plot = OUTPUT / f"{name}.svg"
    words = ["--model", arguments.model, "--weights", "fp32", "--text", str(arguments.text), "--json"]
    words += [word.format(plot=plot, task=arguments.task) for word in RUNS[name].split()]
    called = [sys.executable, "-m", "fineserve_jax.entrypoints.cli", "quality", *words]
    printed = subprocess.run(called, check=True, stdout=subprocess.PIPE, text=True).stdout
    shown = [Path(word).name if "/" in word else word for word in words]
    found = {"command": " ".join(("fineserve-jax quality", *shown)), **json.loads(printed)}
    (OUTPUT / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
