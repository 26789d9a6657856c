"""Wheels of what the project needs beside JAX, for a machine without a network.

    python -m tools.gpu_session.gather FOLDER --python 3.12 --installed PACKAGES.txt

`--installed` names what is there already, as `pip list --format=freeze` prints it: those packages are not gathered. JAX
and what it brings never are. The folder also gets requirements.txt, for `pip install --no-index --find-links FOLDER`.
"""

import dataclasses
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).parents[2]
WITH_JAX = {"jax", "jaxlib", "numpy", "scipy", "ml-dtypes", "opt-einsum"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    folder: Annotated[Path, tyro.conf.Positional]
    python: str = "3.12"
    installed: Path | None = None
    glibc: int = 35
    """The machine's glibc is 2.N, as `ldd --version` says; wheels for it and older ones are taken."""
    machine: str = "x86_64"


def main() -> None:
    arguments = tyro.cli(Arguments, description=__doc__)
    there = WITH_JAX | names_of(arguments.installed.read_text().splitlines() if arguments.installed else ())
    arguments.folder.mkdir(parents=True, exist_ok=True)
    wanted = needs(there)
    (arguments.folder / "requirements.txt").write_text("\n".join(wanted) + "\n")
    command = [sys.executable, "-m", "pip", "download", "--only-binary=:all:", "--python-version", arguments.python]
    command += ["--implementation", "cp", "--dest", str(arguments.folder)]
    platforms = [f"manylinux_2_{n}_{arguments.machine}" for n in range(arguments.glibc, 16, -1)]
    platforms.append(f"manylinux2014_{arguments.machine}")
    command += [part for platform in platforms for part in ("--platform", platform)]
    done = subprocess.run([*command, *wanted], check=False)
    if done.returncode:
        sys.exit(f"pip could not download them; its words are above. Wanted were: {', '.join(wanted)}")
    for wheel in arguments.folder.glob("*.whl"):
        if names_of([wheel.name.split("-")[0]]) & there:
            wheel.unlink()
    size = sum(wheel.stat().st_size for wheel in arguments.folder.glob("*.whl"))
    print(f"{arguments.folder}: {size / 2**20:.0f} MiB")


def needs(there: set[str]) -> list[str]:
    """The project's requirements, but for packages that are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [need for need in project["dependencies"] if not names_of([need]) & there]


def names_of(requirements: Iterable[str]) -> set[str]:
    """The names in lines such as "Flax>=0.12", in the form that compares (PEP 503)."""
    found = (re.match(r"[A-Za-z0-9._-]+", line.strip()) for line in requirements)
    return {re.sub(r"[-_.]+", "-", name[0]).lower() for name in found if name}


if __name__ == "__main__":
    main()
