"""What the program imports to say what it can do: help does not wait for jax."""

import importlib.metadata
import inspect
import json
import subprocess
import sys

import pytest

from fineserve_jax.entrypoints.cli.commands import COMMANDS, load_command

HEAVY = {"jax", "jaxlib", "flax", "orbax", "scipy", "matplotlib", "tokenizers", "gguf", "safetensors"}
IMPORTED = """
import json, sys
from fineserve_jax.entrypoints.cli import main
try:
    main(sys.argv[1:])
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported_by(*arguments):
    """The modules that the program has imported when it ends, and their packages."""
    done = subprocess.run([sys.executable, "-c", IMPORTED, *arguments], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stderr.splitlines()[-1]))
    return modules, {module.partition(".")[0] for module in modules}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["simulate", "--help"]], ids=" ".join)
def test_help_and_version_import_nothing_heavy(arguments):
    modules, packages = imported_by(*arguments)
    assert not packages & HEAVY
    if "simulate" not in arguments:
        assert not modules & {f"fineserve_jax.entrypoints.cli.{command.module}" for command in COMMANDS.values()}


def test_the_version_is_that_of_the_package(run):
    assert run("--version") == (0, f"fineserve-jax {importlib.metadata.version('fineserve-jax')}\n", "")


def test_help_names_every_command(run):
    status, out, _ = run("--help")
    assert status == 0
    said = " ".join(out.replace("│", " ").split())
    for name, command in COMMANDS.items():
        assert f"• {name} {command.summary}" in said


@pytest.mark.parametrize("name", COMMANDS)
def test_a_summary_is_what_the_command_says_of_itself(name):
    docstring = inspect.getdoc(load_command(name))
    assert " ".join(docstring.partition("\n\n")[0].split()) == COMMANDS[name].summary


def test_a_command_that_is_unknown_or_missing_is_told_what_there_is(run):
    for arguments in (["sever"], []):
        status, _, err = run(*arguments)
        assert status == 2
        assert all(name in err for name in COMMANDS)


def test_an_option_that_is_mistyped_is_told_the_right_one(run):
    status, _, err = run("simulate", "--polcy", "fcfs")
    assert status == 2
    assert "--policy" in err


def test_a_shell_completes_the_options_of_every_command(run):
    status, out, _ = run("--tyro-print-completion", "bash")
    assert not status
    for flag in ("--kv-precision", "--step-profile", "--page-only"):
        assert flag in out
