"""The table of commands. A command's module is imported when the command is called, and no other: most need jax,
which takes seconds, and help should not wait for it."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version

import tyro

PROGRAM = "fineserve-jax"
DESCRIPTION = (
    "LLM inference with KV caches of different precisions in one batch.\n"
    "`fineserve-jax COMMAND --help` explains a command, `fineserve-jax --version` prints the version."
)
# Shared options bear their own names, and None is no word to type.
STYLE = (tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)


@dataclass(frozen=True)
class Command:
    """A command, which is the function of its name in a module of this package.

    Attributes:
        module: the name of that module.
        summary: the first paragraph of the function's docstring.
    """

    module: str
    summary: str


COMMANDS = {
    "batch": Command(
        "batch", "Answer every row of a file of prompts, each with its KV cache in the precision it asks for."
    ),
    "serve": Command(
        "serve",
        "Serve models to OpenAI's client and others like it, each request with its KV cache in the precision it asks "
        "for.",
    ),
    "generate": Command("generate", "Answer one prompt, printing the answer as it comes."),
    "perplexity": Command(
        "perplexity", "Measure a model's perplexity on a text, its keys and values kept as requests would keep them."
    ),
    "quality": Command(
        "quality",
        "Measure what KV formats, auto under pressure and narrow weights cost in quality, and say which to take.",
    ),
    "bench": Command(
        "bench",
        "Measure how fast a model is served on this machine: tokens a second, and percentiles of latencies.",
    ),
    "warm": Command(
        "warm",
        "Compile all that serving can need into the compilation cache, so that the next start with the same settings, "
        "on such a machine, loads it instead.",
    ),
    "slabs": Command(
        "slabs",
        "Draw a recorded run: a picture (PNG), and a page for the browser that needs no network (HTML).",
    ),
    "simulate": Command(
        "simulate", "Replay a workload on a virtual clock, at the scale of devices that need not be there."
    ),
    "place": Command(
        "place", "Say which model goes on which devices, with how many replicas, and what to expect of it."
    ),
    "convert": Command(
        "models",
        "Write a model as an Orbax checkpoint that starts quickly, its weights in the precision they will be used in.",
    ),
    "fetch": Command("models", "Download a model into the cache, verify its checksum, and print where it is."),
}


def load_command(name: str) -> Callable[..., None]:
    """Imports the module of one of `COMMANDS` and returns the command's function."""
    module = importlib.import_module(f"fineserve_jax.entrypoints.cli.{COMMANDS[name].module}")
    function: Callable[..., None] = getattr(module, name)
    return function


def run_command(arguments: Sequence[str]) -> None:
    """Runs the command that the first of `arguments` names, or prints the version.

    Raises:
        SystemExit: for `--help` (status 0), and for arguments that cannot be parsed (status 2).
    """
    if arguments and arguments[0] in COMMANDS:
        name, *rest = arguments
        tyro.cli(load_command(name), prog=f"{PROGRAM} {name}", args=rest, config=STYLE)
    elif list(arguments) == ["--version"]:
        print(f"{PROGRAM} {version(PROGRAM)}")
    else:
        # tyro's own flags, which print a shell's completions, need every command's options; help and errors do not.
        complete = any(argument.startswith("--tyro-") for argument in arguments)
        _all_commands(load_command if complete else _stand_in).cli(
            prog=PROGRAM, description=DESCRIPTION, args=arguments, config=STYLE
        )


def _all_commands(function_of: Callable[[str], Callable[..., None]]) -> tyro.extras.SubcommandApp:
    app = tyro.extras.SubcommandApp()
    for name, command in COMMANDS.items():
        app.command(name=name, help=command.summary)(function_of(name))
    return app


def _stand_in(name: str) -> Callable[..., None]:
    """A function without options, in place of a command that will not be called."""

    def command() -> None:
        raise AssertionError(f"{name} was called without its module")

    return command
